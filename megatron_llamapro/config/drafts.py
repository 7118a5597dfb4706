"""Output that is complete or absent: files and folders are written as drafts and then renamed. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_llamapro.config.errors import SHORT_WRITE, CheckpointError, RunError
from megatron_llamapro.config.files import broken_link, naming


def draft_of(target: Path) -> Path:
    """Return the draft folder of a target, beside it.

    Raises:
        CheckpointError: `target` has no name of its own, such as `/` or `..`.
    """
    target = Path(target).absolute()
    if target.name in ("", ".."):
        raise CheckpointError(f"{target} cannot be a target: give the name of a folder to write")
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def staged(
    target: Path, *, overwrite: bool, resume: bool = False, sources: tuple[Path, ...] = (), journal: str | None = None
) -> Iterator[Path]:
    """Yield a draft folder beside `target`. When the block succeeds, the draft is synced and becomes `target`.

    The file `journal` in the draft is removed only after the sync, which takes minutes for a large checkpoint.
    If the block fails, `target` is unchanged and the draft is removed. After a kill or an interrupt the draft stays.
    With `resume`, which resumes an earlier draft, it stays after any failure. The next writer to the same target clears
    or resumes it. That writer also restores a target whose replacement a kill interrupted.

    Raises:
        CheckpointError: `target` exists and is not empty (unless `overwrite`), is one of `sources` or holds or lies in
            one, or another process is writing to it.
    """
    target = Path(target).absolute()
    draft = draft_of(target)
    check_target(target, overwrite=overwrite, sources=sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(draft, target):
        try:
            _restore(target)
            check_target(target, overwrite=overwrite, sources=sources)
            if not resume:
                clear(draft)
            yield draft
            sync_tree(draft)
            if journal is not None:
                (draft / journal).unlink()
                sync(draft)
            check_target(target, overwrite=overwrite, sources=sources)
            _move_into_place(draft, target)
        except Exception:
            if not resume:
                shutil.rmtree(draft, ignore_errors=True)
            raise


def check_target(target: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    """Raise `CheckpointError` if `staged` would refuse the target, apart from other processes."""
    real = Path(os.path.realpath(target))  # `resolve` raises if links form a loop
    for source in sources:
        inside = Path(source).resolve()
        if real == inside or real in inside.parents or inside in real.parents:
            raise CheckpointError(f"the target {target} and the source {source} overlap: choose another target")
    if target.is_symlink():
        raise CheckpointError(f"{target} is a link: give the folder itself")
    if (broken := broken_link(target)) is not None:
        raise CheckpointError(f"{target} cannot be a target: {broken}")
    if target.is_dir():
        if not overwrite and any(target.iterdir()):
            raise CheckpointError(f"{target} exists and is not empty: choose another target, or give --overwrite")
    elif target.exists():
        raise CheckpointError(f"{target} exists and is not a folder: choose another target")


@contextlib.contextmanager
def locked(draft: Path, target: Path) -> Iterator[None]:
    """Make the draft folder and hold its lock. The kernel frees the lock when this process ends in any way.

    Raises:
        CheckpointError: another process holds the lock, or something else is in the folder's place.
    """
    busy = CheckpointError(f"another process is writing {target}: wait for it, or choose another target")
    if draft.is_symlink() or draft.is_file():
        raise CheckpointError(f"{draft} is in the way, and this program did not make it: remove it, then try again")
    try:
        draft.mkdir(exist_ok=True)
    except FileExistsError:  # its owner has just finished with it
        raise busy from None
    try:
        descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:  # likewise
        raise busy from None
    try:
        if not _lock(descriptor) or not _is_still(descriptor, draft):
            raise busy
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open folder is still the one at `path`. Its last owner may have renamed or removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def clear(folder: Path, *, but: Collection[str] = ()) -> None:
    """Remove everything in a folder except files and folders with a name in `but`."""
    for path in folder.iterdir():
        if path.name in but:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore(target: Path) -> None:
    """Undo the first of the two renames of `_move_into_place`, if a kill came between them."""
    if _replaced(target).is_dir() and not target.exists():
        _replaced(target).rename(target)


def _move_into_place(draft: Path, target: Path) -> None:
    """Rename the old target away and the draft to `target`. If the second rename fails, undo the first."""
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    had_target = target.exists()
    if had_target:
        target.rename(replaced)
    try:
        draft.rename(target)
    except OSError:
        if had_target:
            replaced.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Make the disk hold everything that was written to a file or folder.

    Raises:
        OSError: the disk cannot. The error names the file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OF_THE_PATH = {
    *(errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


def is_of_the_path(error: OSError) -> bool:
    """Whether an error is about the path, so that a retry needs another path. (A full disk may have room later.)"""
    return error.errno in _OF_THE_PATH


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents. If the block fails, remove those that were made."""
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
    """Yield an empty folder beside `target` to write in, and remove it at the end.

    Only one process at a time can have it. If a process was killed, the next one clears its folder.

    Raises:
        CheckpointError: another process has the folder.
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
    """Turn a failure of the file system (e.g. a full disk) or of memory into a `RunError`: a retry may succeed."""
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
    """Return the system's reason for an error. numpy's errors say only how much it wrote."""
    return error.strerror or SHORT_WRITE
