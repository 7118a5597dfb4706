"""What of a run is on the disk, in words, whenever it ends. Needs no torch: it may end before that is imported."""

from __future__ import annotations

from pathlib import Path

from megatron_llamapro.checkpoint.folder import RELEASE, latest_checkpoint
from megatron_llamapro.config.errors import CheckpointError


def what_is_kept(save: str | None) -> str:
    """The last complete checkpoint in `save`, and how to resume."""
    if save is None:
        return "nothing was saved (set checkpoint.save to keep the model)"
    try:
        folder = latest_checkpoint(Path(save))
    except (OSError, CheckpointError):
        folder = None
    if folder is None:
        return f"nothing was saved yet in {save}"
    step = RELEASE if folder.name == RELEASE else f"step {int(folder.name.removeprefix('iter_'))}"
    return f"checkpoint: {save}, {step}; the same command resumes from it"
