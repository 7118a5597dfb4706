"""Which checkpoints of a run are removed, and how, so that a kill in between leaves no half of one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_llamapro.checkpoint.folder import iteration_folder

LEFTOVERS = "iter_*.tmp"
"""Folders that are no checkpoints: half written or half removed."""

_CHECKPOINT = re.compile(r"iter_(\d{7,})")


def superseded(iterations: Collection[int], *, newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Those of a run's checkpoints that go, oldest first: none that is newer than `newest`, the last complete one, nor
    that itself."""
    if keep_last is None:
        return []
    older = sorted(iteration for iteration in iterations if iteration < newest)
    spared = older[max(0, len(older) - (keep_last - 1)) :]  # beside the newest
    return [i for i in older if i not in spared and not (keep_every and i % keep_every == 0)]


def prune(
    save: Path, *, newest: int, keep_last: int | None, keep_every: int | None, needed: Collection[Path] = ()
) -> None:
    """Remove what `superseded` says, but nothing that is `needed`; bases are no checkpoints of a step, and stay."""
    found = (_CHECKPOINT.fullmatch(path.name) for path in save.iterdir())
    iterations = [int(match.group(1)) for match in found if match]
    spared = {path.resolve() for path in needed}
    for iteration in superseded(iterations, newest=newest, keep_last=keep_last, keep_every=keep_every):
        folder = iteration_folder(save, iteration)
        if folder.resolve() not in spared:
            removed = folder.with_name(f"{folder.name}.removed.tmp")
            folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(save: Path) -> None:
    """Remove what a run left that was killed while it wrote or removed a checkpoint."""
    for leftover in save.glob(LEFTOVERS):
        shutil.rmtree(leftover, ignore_errors=True)
