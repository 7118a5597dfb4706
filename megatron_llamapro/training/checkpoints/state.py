"""The contents of a training checkpoint, and how a run resumes from one, at the same or another TP x PP x DP.

A delta checkpoint holds the trainable part; the rest is loaded from its base. `saver.py` writes checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_llamapro.checkpoint.formats.delta import Delta
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.names import unwrapped
from megatron_llamapro.optimizer.build import torch_adam_parts
from megatron_llamapro.optimizer.replicas import finish_param_gathers
from megatron_llamapro.optimizer.torch_adam import init_state
from megatron_llamapro.training.checkpoints.delta_parts import check_base, split
from megatron_llamapro.training.checkpoints.resume import PROGRESS, RunIdentity
from megatron_llamapro.training.machine import Machine

# Optimizer state is stored in the shape of the parameters it belongs to, so that any layout can read it. (Upstream's
# default cannot be saved at all; its faster "dp_reshardable" does not resume exactly.) Every layer has its own keys;
# `non_homogeneous_layers` tells a stock GPTModel so.
_METADATA = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def model_state(chunks: Sequence[torch.nn.Module]) -> dict:
    """Return the sharded state dict of this rank's chunks, without Transformer Engine's (derived) extra state."""
    state = {f"model{i}": unwrapped(chunk).sharded_state_dict(metadata=_METADATA) for i, chunk in enumerate(chunks)}
    return {
        chunk: {key: value for key, value in tensors.items() if not _is_extra_state(key, value)}
        for chunk, tensors in state.items()
    }


def _is_extra_state(key: str, value: object) -> bool:
    return key.endswith("_extra_state") or isinstance(value, ShardedObject)


def training_state(machine: Machine, *, state: TrainingState, identity: RunIdentity, delta: Delta | None) -> dict:
    """Return everything a resumed run needs, as a sharded state dict. With a `delta`, it holds only the trainable part
    of the model. All ranks call it."""
    optimizer = machine.optimizer
    _note_steps(optimizer, state)
    finish_param_gathers(machine.chunks)
    if state.num_updates == 0:  # the optimizer creates its state in its first update
        for part in optimizer.chained_optimizers:
            if part.optimizer is not None:
                init_state(part)
    model = model_state(machine.chunks)
    optimizer_state = optimizer.sharded_state_dict(model, is_loading=False, metadata=_METADATA)
    progress = {**asdict(state), **asdict(identity), "scheduler": machine.scheduler.state_dict()}
    kept = split(model, delta.trained)[0] if delta else model
    return {**kept, "optimizer": optimizer_state, PROGRESS: progress, "content_metadata": dict(_METADATA)}


def load_model(chunks: Sequence[torch.nn.Module], source: SmallFiles) -> None:
    """Fill the model's weights from a torch_dist checkpoint. All ranks call it.

    Raises:
        CheckpointError: it does not fit the model, or is a delta whose base does not exist or was replaced.
    """
    _apply_model(chunks, _load(model_state(chunks), {}, source))


def load_values(sharded: dict, source: SmallFiles) -> dict:
    """Return a checkpoint's values for some of a model's sharded tensors. All ranks call it. Errors of `load_model`."""
    return _load({"values": sharded}, {}, source).get("values", {})


def load_checkpoint(machine: Machine, source: SmallFiles) -> TrainingState:
    """Resume from `source`: load weights, optimizer and schedule, and return the progress. All ranks call it. The
    parallel layout may differ from the one that saved. Raises the errors of `load_model`."""
    optimizer = machine.optimizer
    for part in torch_adam_parts(optimizer):
        init_state(part)
    model = model_state(machine.chunks)
    optimizer_state = optimizer.sharded_state_dict(model, is_loading=True, metadata=_METADATA)
    loaded = _load(model, {"optimizer": optimizer_state}, source)
    _apply_model(machine.chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    progress = loaded[PROGRESS]
    machine.scheduler.load_state_dict(progress["scheduler"])
    known = {field.name: progress[field.name] for field in fields(TrainingState) if field.name in progress}
    state = TrainingState(**known)  # earlier versions had fewer fields
    _note_steps(optimizer, state)
    return state


def _load(model: dict, others: dict, source: SmallFiles) -> dict:
    """Return a checkpoint's values for a model's sharded state and `others`. A delta's missing tensors come from its
    base.

    Everything requested must exist. A resumed run must also request everything that its delta holds. Nothing that the
    delta replaces is loaded from the base.
    """
    folder, delta, base = str(source.folder), source.delta, source.base
    if delta is None or base is None:
        return dist_checkpointing.load({**model, **others}, folder, strict=StrictHandling.RAISE_UNEXPECTED)
    check_base(base, delta)
    trained, frozen = split(model, delta.trained)
    of_base = dist_checkpointing.load(frozen, str(base.folder), strict=StrictHandling.RAISE_UNEXPECTED)
    strict = StrictHandling.RAISE_ALL if others else StrictHandling.RAISE_UNEXPECTED
    loaded = dist_checkpointing.load({**trained, **others}, folder, strict=strict)
    return {**loaded, **{chunk: {**of_base.get(chunk, {}), **loaded.get(chunk, {})} for chunk in model}}


def _apply_model(chunks: Sequence[torch.nn.Module], loaded: Mapping) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrapped(chunk).load_state_dict(
            loaded.get(f"model{index}", {}),  # a chunk without layers has nothing stored
            strict=False,
        )
        missing = [key for key in missing if not key.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(f"the checkpoint does not fit the model: {[*missing, *unexpected][:3]}")


def _note_steps(optimizer: MegatronOptimizer, state: TrainingState) -> None:
    for part in torch_adam_parts(optimizer):
        part.lent_step = float(state.num_updates)


class Outcome(Enum):
    """How a step ended."""

    UPDATED = "updated"
    SKIPPED = "skipped"
    """Its loss or gradient norm was not finite, or the norm was exactly 0, so it updated nothing."""
    LEFT_OUT = "left out"
    """training.skip_iterations names it."""


@dataclass
class TrainingState:
    """A run's progress; saved with every checkpoint."""

    iteration: int = 0
    """Steps done, including those without an update."""
    consumed_samples: int = 0
    """Samples that these steps cover in the data order. With the order, this is the whole state of the data."""
    skipped_steps: list[int] = field(default_factory=list)
    """The steps that updated nothing, counted from 1."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last update, without those left out."""

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer made."""
        return self.iteration - len(self.skipped_steps)

    def end_step(self, outcome: Outcome, *, num_samples: int) -> None:
        """Count a step of `num_samples` samples."""
        self.iteration += 1
        self.consumed_samples += num_samples
        if outcome is not Outcome.UPDATED:
            self.skipped_steps.append(self.iteration)
        if outcome is not Outcome.LEFT_OUT:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome is Outcome.SKIPPED else 0
