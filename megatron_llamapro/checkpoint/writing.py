"""What every command that writes a checkpoint's tensors shares: its options, its journal, a look at the disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_llamapro.checkpoint.tensors.layout import TargetLayout
from megatron_llamapro.checkpoint.tensors.streaming import FileState, Progress, nothing
from megatron_llamapro.checkpoint.tensors.transfer import Journal, TensorJob, are_complete, default_workers
from megatron_llamapro.config.drafts import clear
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.values import decimal_size

JOURNAL = ".llamapro-journal.jsonl"


class _Stored(Protocol):
    """What lies in files of a folder, or of several: a checkpoint, or a pack."""

    @property
    def folder(self) -> Path: ...

    @property
    def states(self) -> Mapping[Path, FileState]: ...


@dataclass(frozen=True)
class Options:
    """Options of every conversion."""

    overwrite: bool = False
    """Replace an existing target, once the new one is complete."""
    resume: bool = False
    """Resume an interrupted conversion to the same target."""
    num_workers: int = 0
    """Number of threads; 0: two per core, at most eight."""
    progress: Progress = nothing
    """Called with numbers of bytes that were just handled: written, or read where a command first reads."""
    on_total: Progress = nothing
    """Called with the number of bytes of the part that starts now."""

    @property
    def workers(self) -> int:
        return self.num_workers or default_workers()


DEFAULTS = Options()


def folders_of(*checkpoints: _Stored) -> tuple[Path, ...]:
    """Return the folders of opened checkpoints, and those of their tensors' files. No target may overlap with them."""
    folders = (folder for each in checkpoints for folder in (each.folder, *(path.parent for path in each.states)))
    return tuple(dict.fromkeys(folders))


def open_journal(draft: Path, fingerprint: str, layout: TargetLayout) -> Journal:
    """Return the journal of an earlier run of the same conversion if its files are complete, else an empty journal.

    Everything else in the draft is deleted: the source may have lost a file since it was copied, e.g. a license.
    """
    journal = Journal(draft / JOURNAL, fingerprint)
    if not journal.is_new and are_complete(layout.files):
        clear(draft, but={JOURNAL, *(file.path.relative_to(draft).parts[0] for file in layout.files)})
        return journal
    clear(draft)
    return Journal(draft / JOURNAL, fingerprint)


def check_space(target: Path, draft: Path, jobs: Sequence[TensorJob], journal: Journal) -> None:
    """Raise `CheckpointError` if the disk is too small: before hours of writing, not after."""
    todo = (job for job in jobs if job.name not in journal.hashes and not job.rows.is_zero)
    needed = sum(job.num_bytes * len(job.copies) for job in todo)
    free = shutil.disk_usage(draft).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {decimal_size(needed)}, but its disk has {decimal_size(free)} free: make room"
        )
