"""Checkpoint folders: the newest one of a run, the format of one, and small JSON records in it. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import hint_where_nothing_is, read_inside

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""The content of that file, and the name of the folder beside it, if the checkpoint is not from a training run."""
TORCH_DIST_MARK = "metadata.json"
"""Every writer of torch_dist writes it last, so that its presence means a complete checkpoint."""
INDEX_NAME = ".metadata"
"""The index of torch_dist: where its tensors are stored."""
COMMON_STATE = "common.pt"
"""The part of torch_dist that is not tensors."""
_HUGGING_FACE = ("*.safetensors", "pytorch_model*.bin")

Record = TypeVar("Record")


def iteration_folder(save: Path, iteration: int) -> Path:
    """Return the folder of the checkpoint after `iteration` steps."""
    return save / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Return the number of steps in the name of a checkpoint's folder, or None if it has another name."""
    match = re.fullmatch(r"iter_(\d{7,})", Path(folder).name)
    return int(match[1]) if match else None


def newest_checkpoints(save: Path, count: int) -> list[Path]:
    """Return the newest complete checkpoints in a training run's folder, oldest first.

    Raises:
        CheckpointError: it has fewer than `count`.
    """
    folders = Path(save).iterdir() if Path(save).is_dir() else ()
    found = {step: path for path in folders if (step := iteration_of(path)) is not None and is_torch_dist(path)}
    if len(found) < count:
        raise CheckpointError(
            f"{save} has {len(found)} complete checkpoint{'s' * (len(found) != 1)}, not {count}: name a run's folder, "
            "or fewer (checkpoint.keep_last may have removed some)"
        )
    return [found[step] for step in sorted(found)[-count:]]


def latest_checkpoint(save: Path) -> Path | None:
    """Return the newest complete checkpoint (or the release) in a training run's folder, or None if it has none yet.

    Raises:
        CheckpointError: the file that names it is damaged, or names a folder that does not exist.
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
        raise CheckpointError(f"{latest} names {folder.name}, which does not exist: write the number of one that does")
    return folder


def resolve_megatron_checkpoint(path: Path) -> Path:
    """Return the folder that holds the tensors: `path` itself, or the newest checkpoint of a training run's folder.

    Raises:
        CheckpointError: `path` is neither.
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
            f"{folder or path} is not a Megatron checkpoint: it has no {TORCH_DIST_MARK} "
            "(llamapro convert hf-to-megatron writes one)"
        )
    return folder


def is_torch_dist(folder: Path) -> bool:
    """Return whether a folder holds a complete checkpoint in torch_dist format.

    Other software also writes a metadata.json, so beside Hugging Face weights it proves nothing.
    """
    if not (folder / TORCH_DIST_MARK).is_file():
        return False
    return (folder / INDEX_NAME).exists() or not any(any(folder.glob(pattern)) for pattern in _HUGGING_FACE)


def what_is_kept(save: str | None) -> str:
    """Return a text that names the last complete checkpoint in `save`, and says how to resume."""
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


def read_record(folder: Path, name: str, *, format_version: int, build: Callable[[dict], Record]) -> Record | None:
    """Return what `build` makes of a JSON record in a checkpoint folder, or None if the folder has no such file.

    Raises:
        CheckpointError: the record is damaged, or of another version.
    """
    path, content = Path(folder) / name, read_inside(folder, name)
    if content is None:
        return None
    try:
        data = json.loads(content)
        if data["format_version"] != format_version:
            raise CheckpointError(
                f"{path} has format {data['format_version']!r}, this version reads {format_version}: use the version "
                "of megatron-llamapro that wrote it"
            )
        return build(data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): restore it from a copy of {folder}") from None


def write_record(folder: Path, name: str, *, format_version: int, fields: dict) -> None:
    """Write a record that `read_record` reads."""
    record = {"format_version": format_version, **fields}
    (Path(folder) / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
