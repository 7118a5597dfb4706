"""Checkpoint folders: which of a run's is the newest, and which format a folder has. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import hint_where_nothing_is, read_inside

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What that file holds, and the folder beside it is called, where a checkpoint is not one of a run's."""
TORCH_DIST_MARK = "metadata.json"
"""Written last by whoever writes torch_dist, so that its presence means a complete checkpoint."""
INDEX_NAME = ".metadata"
"""Of torch_dist: where its tensors lie."""
COMMON_STATE = "common.pt"
"""Of torch_dist: what is no tensor."""
_HUGGING_FACE = ("*.safetensors", "pytorch_model*.bin")


def iteration_folder(save: Path, iteration: int) -> Path:
    """Folder of the checkpoint after `iteration` steps."""
    return save / f"iter_{iteration:07d}"


def latest_checkpoint(save: Path) -> Path | None:
    """The newest complete checkpoint of a training run's folder (or its release), or None where there is none yet.

    Raises:
        CheckpointError: the file that names it is damaged, or names a folder that is not there.
    """
    latest, content = Path(save) / LATEST, read_inside(save, LATEST)
    if content is None:
        return None
    text = content.decode(errors="replace").strip()
    is_step = text.isascii() and text.isdigit() and len(text) < 20
    if not is_step and text != RELEASE:
        raise CheckpointError(
            f"{latest} holds '{text[:40]}', not a step number: write the number of a folder beside it"
        )
    folder = iteration_folder(save, int(text)) if is_step else save / RELEASE
    if not folder.is_dir():
        raise CheckpointError(f"{latest} names {folder.name}, which is not there: write the number of one that is")
    return folder


def resolve_megatron_checkpoint(path: Path) -> Path:
    """The folder that holds the tensors: `path` itself, or the newest checkpoint of a training run's folder.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    if not path.is_dir():
        hint = hint_where_nothing_is(path) or "give the folder of a Megatron checkpoint"
        raise CheckpointError(f"{path} is not a folder: {hint}")
    folder = path if is_torch_dist(path) else latest_checkpoint(path)
    if any((folder or path).glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder or path} is a legacy checkpoint, for one division of ranks: convert it with "
            "llamapro convert megatron-to-megatron"
        )
    if folder is None or not is_torch_dist(folder):
        raise CheckpointError(
            f"{folder or path} is not a Megatron checkpoint: it has no {TORCH_DIST_MARK} of one "
            "(llamapro convert hf-to-megatron writes one)"
        )
    return folder


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder holds a complete checkpoint in torch_dist format. Others call a file metadata.json too, so
    beside Hugging Face's weights it says nothing."""
    if not (folder / TORCH_DIST_MARK).is_file():
        return False
    return (folder / INDEX_NAME).exists() or not any(any(folder.glob(pattern)) for pattern in _HUGGING_FACE)


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
