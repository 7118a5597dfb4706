"""Output that is complete or not there: written aside, and nothing left of it where it fails."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_llamapro.config.errors import SHORT_WRITE, RunError
from megatron_llamapro.config.staging import clear, locked

_OF_THE_PATH = {
    *(errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


def is_of_the_path(error: OSError) -> bool:
    """Whether another try meets the error again, until another path is given; a full disk may have room by then."""
    return error.errno in _OF_THE_PATH


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """The folder, made with its parents; those that were made are gone again where the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty, or never made
                path.rmdir()
        raise


@contextlib.contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to write in, gone at the end.

    One process at a time has it. That of a process that was killed is cleared by the next one.

    Raises:
        CheckpointError: another process has it.
    """
    draft = target.with_name(f".{target.name}.tokens.partial")
    with folder_made(target.parent), locked(draft, target):
        try:
            clear(draft)
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path | str) -> Iterator[None]:
    """A failure of the file system, e.g. a full disk, and of memory is a `RunError`: another try may succeed."""
    try:
        yield
    except OSError as error:
        if is_of_the_path(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(f"{target} was not written: {reason_of(error)}{where}: make room, then try again") from error
    except MemoryError:
        raise RunError(f"{target} was not written: memory ran out") from None


def reason_of(error: OSError) -> str:
    """What the system answered; numpy tells no more than how much it wrote."""
    return error.strerror or SHORT_WRITE
