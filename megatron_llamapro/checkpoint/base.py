"""The base of a run's delta checkpoints: the checkpoint that it started from, kept in the run's own folder.

In the run's folder, so that a run can be moved as a whole, and lives on when the starting checkpoint is moved, deleted
or (being another run's newest) followed by a newer one. It costs no disk where the file system can share: the files of
weights are clones of the starting checkpoint's where there is copy-on-write, else hard links, and copies only across
file systems.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_llamapro.checkpoint.carried import carry_files
from megatron_llamapro.checkpoint.convert import megatron_to_megatron
from megatron_llamapro.checkpoint.delta import Delta
from megatron_llamapro.checkpoint.dist_index import read_index
from megatron_llamapro.checkpoint.folder import INDEX_NAME, TORCH_DIST_MARK, staged
from megatron_llamapro.checkpoint.manifest import MANIFEST_NAME
from megatron_llamapro.checkpoint.megatron_dist import COMMON_STATE, is_training_state, open_torch_dist
from megatron_llamapro.checkpoint.streaming import SourceFiles, stored_hash
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside
from megatron_llamapro.model.families import CONFIG_NAME

_CLONE = 0x40049409  # FICLONE of linux/fs.h
_HASHING_THREADS = 2  # a rank; several ranks share a machine


def make_base(source: Path, base: Path) -> None:
    """Make `base`, a complete checkpoint of the weights of `source` (torch_dist); complete or absent at any kill.

    Raises:
        CheckpointError: it cannot be written, or is there already.
    """
    if Delta.read(source) is not None or any(map(is_training_state, read_index(source))):
        megatron_to_megatron(source, base, merge_adapters=False)  # the weights alone
        return
    with staged(base, overwrite=False, sources=(source,)) as draft:
        carry_files(source, draft)
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
    """Have `target` hold the bytes of `source` as cheaply as the file system can."""
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


def tensor_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """BLAKE3 of tensors of a torch_dist checkpoint, by their Hugging Face names. Streams.

    Raises:
        CheckpointError: it is damaged, or has no such tensor.
    """
    checkpoint = open_torch_dist(folder)
    names = list(names)
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{folder} has no tensor {missing[0]}, which the delta checkpoints need of it")
    with SourceFiles(checkpoint.states) as files, ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = pool.map(lambda name: stored_hash(checkpoint.tensors[name], files, checkpoint.itemsize), names)
        return dict(zip(names, hashes, strict=True))
