"""Training checkpoints: `save/iter_0000100/`, complete or absent, loadable at another TP x PP x DP.

A folder is written under a temporary name and renamed when every rank is done; only then does
`latest_checkpointed_iteration.txt` name it. A kill at any moment leaves the last complete one loadable.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_llamapro.checkpoint.folder import LATEST, carry_files, iteration_folder, sync
from megatron_llamapro.checkpoint.manifest import MANIFEST_NAME
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.families import CONFIG_NAME
from megatron_llamapro.model.names import unwrapped
from megatron_llamapro.optimizer.build import torch_adam_parts
from megatron_llamapro.training.resume import PROGRESS, RunIdentity
from megatron_llamapro.training.state import TrainingState

# Optimizer state is stored in the shape of the parameters it belongs to, so that any layout can read it. (Upstream's
# default cannot be saved at all; its faster "dp_reshardable" does not resume exactly.)
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(chunks: Sequence[torch.nn.Module]) -> dict:
    """Sharded state dict of this rank's chunks, without Transformer Engine's extra state, which is derived."""
    state = {f"model{i}": unwrapped(chunk).sharded_state_dict(metadata=_METADATA) for i, chunk in enumerate(chunks)}
    return {
        chunk: {key: value for key, value in tensors.items() if not _is_extra_state(key, value)}
        for chunk, tensors in state.items()
    }


def _is_extra_state(key: str, value: object) -> bool:
    return key.endswith("_extra_state") or isinstance(value, ShardedObject)


def load_model(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Fill the model's weights from a checkpoint in torch_dist format. All ranks call it."""
    _apply_model(
        chunks,
        dist_checkpointing.load(model_state(chunks), str(folder), strict=StrictHandling.RAISE_UNEXPECTED),
    )


def _apply_model(chunks: Sequence[torch.nn.Module], loaded: Mapping) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrapped(chunk).load_state_dict(
            loaded.get(f"model{index}", {}),  # of a chunk without layers nothing is stored
            strict=False,
        )
        missing = [key for key in missing if not key.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(f"the checkpoint does not fit the model: {[*missing, *unexpected][:3]}")


def save_checkpoint(
    save: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: TrainingState,
    identity: RunIdentity,
    source: Path,
    companions: Mapping[str, str],
) -> Path:
    """Write everything a resumed run needs, and what makes the folder a checkpoint for every tool. All ranks call it.

    Manifest, config.json and tokenizer come from `source`, the checkpoint that the run started from; `companions` are
    text files by name (run.yaml).
    """
    folder = iteration_folder(save, state.iteration)
    temporary = folder.with_name(f"{folder.name}.tmp")
    if dist.get_rank() == 0:
        for leftover in save.glob("iter_*.tmp"):  # of a run that was killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _note_steps(optimizer, state)
    model = model_state(chunks)
    optimizer_state = optimizer.sharded_state_dict(model, is_loading=False, metadata=_METADATA)
    progress = {**asdict(state), **asdict(identity), "scheduler": scheduler.state_dict()}
    dist_checkpointing.save(
        {**model, "optimizer": optimizer_state, PROGRESS: progress},
        str(temporary),
        content_metadata=_METADATA,
    )
    dist.barrier()
    if dist.get_rank() == 0:
        carry_files(source, temporary)
        for name in (CONFIG_NAME, MANIFEST_NAME):
            shutil.copyfile(source / name, temporary / name)
        for name, text in companions.items():
            (temporary / name).write_text(text)
        _publish(temporary, folder)
    dist.barrier()
    return folder


def _publish(temporary: Path, folder: Path) -> None:
    """Make the finished folder the newest checkpoint, in an order that a kill cannot break."""
    for path in temporary.rglob("*"):
        if path.is_file():
            sync(path)
    sync(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    latest = folder.parent / LATEST
    draft = latest.with_name(f"{LATEST}.tmp")
    draft.write_text(f"{int(folder.name.removeprefix('iter_'))}\n")
    sync(draft)
    draft.replace(latest)
    sync(folder.parent)


def load_checkpoint(
    folder: Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> TrainingState:
    """Continue from `folder`: weights, optimizer, schedule; returns the progress. All ranks call it; the layout may be
    another than the one that saved."""
    for part in torch_adam_parts(optimizer):
        part.init_state()
    model = model_state(chunks)
    wanted = {**model, "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=_METADATA)}
    loaded = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    _apply_model(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    progress = loaded[PROGRESS]
    scheduler.load_state_dict(progress["scheduler"])
    state = TrainingState(iteration=progress["iteration"], consumed_samples=progress["consumed_samples"])
    _note_steps(optimizer, state)
    return state


def _note_steps(optimizer: MegatronOptimizer, state: TrainingState) -> None:
    for part in torch_adam_parts(optimizer):
        part.lent_step = float(state.iteration)
