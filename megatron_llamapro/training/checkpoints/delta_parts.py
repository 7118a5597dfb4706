"""Splits a run's state between a delta checkpoint and its base. All ranks call these functions.

`requires_grad` marks the trainable part: a delta holds what freezing left trainable, and nothing else.

The base is the checkpoint that the run started from, kept in the run's own folder. The run can then be moved as a
whole, and survives if the starting checkpoint is moved, deleted or followed by a newer one. On a copy-on-write file
system the base's weight files are clones of the starting checkpoint's, else hard links. They are copied only across
file systems.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llamapro.checkpoint.convert import megatron_to_megatron
from megatron_llamapro.checkpoint.formats.delta import BASE, Delta
from megatron_llamapro.checkpoint.formats.folders import COMMON_STATE, INDEX_NAME, TORCH_DIST_MARK
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.checkpoint.formats.torch_dist import locate_tensors
from megatron_llamapro.checkpoint.formats.torch_dist_index import is_training_state
from megatron_llamapro.checkpoint.side_files import copy_side_files
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, stored_hash
from megatron_llamapro.checkpoint.tensors.weight_map import frozen_names
from megatron_llamapro.config.drafts import staged
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside
from megatron_llamapro.expansion.manifest import MANIFEST_NAME
from megatron_llamapro.families.hf_config import CONFIG_NAME
from megatron_llamapro.runtime.distributed import ask_first_rank, failing_together, from_first_rank


def trained_keys(state: dict) -> tuple[str, ...] | None:
    """Return the keys of the trainable sharded tensors in all ranks' model `state`; None if all are trainable."""
    local = [(held.key, _is_frozen(held.data)) for tensors in state.values() for held in tensors.values()]
    gathered: list[list[tuple[str, bool]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    frozen = {key for keys in gathered for key, is_frozen in keys if is_frozen}
    trained = {key for keys in gathered for key, is_frozen in keys if not is_frozen}
    if frozen & trained:
        raise CheckpointError(f"{sorted(frozen & trained)[0]} trains on some ranks only: set checkpoint.delta to false")
    return tuple(sorted(trained)) if frozen else None


def _is_frozen(tensor: object) -> bool:
    """Return whether a tensor is frozen. Buffers are not, because they may change in training."""
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def split(state: dict, trained: Collection[str]) -> tuple[dict, dict]:
    """Split a model's sharded state into the tensors whose keys are in `trained`, and the rest."""
    keys = frozenset(trained)
    parts = []
    for wanted in (True, False):
        parts.append(
            {
                chunk: {name: held for name, held in tensors.items() if (held.key in keys) is wanted}
                for chunk, tensors in state.items()
            }
        )
    return parts[0], parts[1]


def delta_of_run(save: Path, *, source: SmallFiles, resume_from: SmallFiles | None, trained: Sequence[str]) -> Delta:
    """Return the record that goes with a run's delta checkpoints. Make their base if it does not exist yet.

    `source` is the checkpoint that the run started from; `resume_from` is its own checkpoint to resume from.

    Raises:
        CheckpointError: the base cannot be made, or a different one exists.
    """
    known = resume_from.delta if resume_from else None
    if known is not None and set(known.trained) == set(trained):
        return known  # the base was checked when the run was loaded
    start, base = resume_from or source, save / BASE
    hashes = _hash_in_shares(start, frozen_names(source.model.shape, trained))
    if from_first_rank(base.exists()):
        _check_same(ask_first_rank(SmallFiles(base).read_all), hashes, start)
    else:
        with failing_together(f"{base} could not be made"):
            if dist.get_rank() == 0:
                make_base(start, base)
    return Delta(base=BASE, base_hashes=hashes, trained=tuple(trained), made_from=str(source.folder))


def _check_same(base: SmallFiles, hashes: dict[str, str], start: SmallFiles) -> None:
    if _hash_in_shares(base, list(hashes)) != hashes:
        raise CheckpointError(
            f"{base.folder} holds other weights than {start.folder}, which this run starts from: choose another "
            "checkpoint.save, or remove the checkpoints of the earlier run and their base"
        )


def check_base(base: SmallFiles, delta: Delta) -> None:
    """Raise `CheckpointError`, on all ranks, if a delta's base does not hold the tensors that were trained with.
    Reads every tensor."""
    delta.check_hashes(base.folder, _hash_in_shares(base, list(delta.base_hashes)))


def _hash_in_shares(source: SmallFiles, names: Sequence[str]) -> dict[str, str]:
    """Return the hashes of a checkpoint's tensors. Every rank reads its share of the tensors."""
    with failing_together(f"{source.folder} could not be read"):
        mine = tensor_hashes(source, names[dist.get_rank() :: dist.get_world_size()])
    gathered: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found = {name: value for hashes in gathered for name, value in hashes.items()}
    return {name: found[name] for name in names}


_CLONE = 0x40049409  # FICLONE of linux/fs.h
_HASHING_THREADS = 2  # per rank; several ranks share a machine


def make_base(small: SmallFiles, base: Path) -> None:
    """Make `base`, a complete checkpoint of the weights of `small`'s checkpoint. After a kill it is complete or absent.

    Raises:
        CheckpointError: it cannot be written, or exists already.
    """
    source = small.folder
    if small.delta is not None or any(map(is_training_state, small.index)):
        megatron_to_megatron(source, base, merge_adapters=False)  # weights only
        return
    with staged(base, overwrite=False, sources=(source,)) as draft:
        copy_side_files(source, draft, config=small.model.config)
        for name in (CONFIG_NAME, MANIFEST_NAME, COMMON_STATE, INDEX_NAME, TORCH_DIST_MARK):
            shutil.copyfile(_inside(source, name), draft / name)
        for path in sorted(source.glob("*.distcp")):
            share(_inside(source, path.name), draft / path.name)


def _inside(folder: Path, name: str) -> Path:
    path = file_inside(folder, name)
    if path is None:
        raise CheckpointError(f"{folder} has no {name}: it is not a complete checkpoint")
    return path.resolve()


def share(source: Path, target: Path) -> None:
    """Make `target` hold the bytes of `source`, as cheaply as the file system can."""
    for way in (_clone, os.link):
        try:
            way(source, target)
            return
        except OSError:
            target.unlink(missing_ok=True)
    shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        fcntl.ioctl(written.fileno(), _CLONE, read.fileno())


def tensor_hashes(source: SmallFiles, names: Iterable[str]) -> dict[str, str]:
    """Return BLAKE3 hashes of a torch_dist checkpoint's tensors, by their Hugging Face names. Streams.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks one of the tensors.
    """
    checkpoint = locate_tensors(source)
    names = list(names)
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{source.folder} has no tensor {missing[0]}, which its delta checkpoints need")
    with SourceFiles(checkpoint.states) as files, ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = pool.map(lambda name: stored_hash(checkpoint.tensors[name], files, checkpoint.itemsize), names)
        return dict(zip(names, hashes, strict=True))
