"""What of a run's state a delta checkpoint holds, and the base for the rest. All ranks call these functions.

What trains is read off `requires_grad`, so whatever freezing left on is saved, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llamapro.checkpoint.base import make_base, tensor_hashes
from megatron_llamapro.checkpoint.delta import BASE, Delta
from megatron_llamapro.checkpoint.weight_map import frozen_names
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.runtime.distributed import failing_together, from_first_rank


def trained_keys(state: dict) -> tuple[str, ...] | None:
    """Keys of the sharded tensors of all ranks' model `state` that train; None where all do."""
    local = [(held.key, _is_frozen(held.data)) for tensors in state.values() for held in tensors.values()]
    gathered: list[list[tuple[str, bool]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    frozen = {key for keys in gathered for key, is_frozen in keys if is_frozen}
    trained = {key for keys in gathered for key, is_frozen in keys if not is_frozen}
    if frozen & trained:
        raise CheckpointError(f"{sorted(frozen & trained)[0]} trains on some ranks only: set checkpoint.delta to false")
    return tuple(sorted(trained)) if frozen else None


def _is_frozen(tensor: object) -> bool:
    """Buffers, which may change while a run trains, are not."""
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def split(state: dict, trained: Collection[str]) -> tuple[dict, dict]:
    """The part of a model's sharded state whose keys are `trained`, and the rest."""
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


def delta_of_run(
    save: Path, *, source: Path, resume_from: Path | None, shape: ModelShape, trained: Sequence[str]
) -> Delta:
    """The record that goes with a run's delta checkpoints, its base made where there is none yet.

    `source` is the checkpoint that the run started from, `resume_from` the one of its own that it goes on from.

    Raises:
        CheckpointError: the base cannot be made, or another one is there.
    """
    known = Delta.read(resume_from) if resume_from else None
    if known is not None and set(known.trained) == set(trained):
        return known  # the base was checked when the run was loaded
    start, base = resume_from or source, save / BASE
    names = frozen_names(shape, trained)
    hashes = _shared_out(start, names)
    if from_first_rank(base.exists()):
        _check_same(base, hashes, start)
    else:
        with failing_together(f"{base} could not be made"):
            if dist.get_rank() == 0:
                make_base(start, base)
    return Delta(base=BASE, base_hashes=hashes, trained=tuple(trained), made_from=str(source))


def _check_same(base: Path, hashes: dict[str, str], start: Path) -> None:
    if _shared_out(base, list(hashes)) != hashes:
        raise CheckpointError(
            f"{base} holds other weights than {start}, from which this run starts: choose another checkpoint.save, or "
            "remove the checkpoints of the earlier run and their base"
        )


def check_base(folder: Path, delta: Delta) -> None:
    """Raise `CheckpointError`, on all ranks, where the base of the delta checkpoint in `folder` is not there, or does
    not hold the tensors that were trained with: every one is read."""
    with failing_together(str(folder)):
        base = delta.base_of(folder)
    delta.check_hashes(base, _shared_out(base, list(delta.base_hashes)))


def _shared_out(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Hashes of a checkpoint's tensors, every rank reading its share."""
    with failing_together(f"{folder} could not be read"):
        mine = tensor_hashes(folder, names[dist.get_rank() :: dist.get_world_size()])
    gathered: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found = {name: value for hashes in gathered for name, value in hashes.items()}
    return {name: found[name] for name in names}
