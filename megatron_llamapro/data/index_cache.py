"""The order of the samples on disk: megatron.core's index files, in a folder for every order that is whole or not used.

megatron.core writes the files in their place and then takes for whole whatever is there. Here they are built aside, in
a folder that is renamed when all are on the disk; and a folder that lacks a file, or whose files are cut, is built
again. Only the first rank looks and builds.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from numpy.lib.format import open_memmap

from megatron_llamapro.config.errors import DataError, LlamaProError, RunError
from megatron_llamapro.config.staging import is_of_the_path, reason_of, sync

_CONTENTS = "files.json"
"""Names and sizes of the others; written last."""
_OLD_SECONDS = 24 * 60 * 60.0
"""A draft of that age is of a run that was killed. No build takes as long; locks are not to be had everywhere."""


def make_cache_dir(cache_dir: Path) -> None:
    """Raise `LlamaProError` where the folder is missing and cannot be made."""
    with naming_the_cache(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def naming_the_cache(cache_dir: Path) -> Iterator[None]:
    """An `OSError` says what it was about.

    Raises:
        DataError: the folder is none, or is not for us to write in.
        RunError: another failure of the file system, e.g. a full disk, which another start may not meet.
    """
    advice = "set data.cache_dir to a folder for the order of the samples"
    try:
        yield
    except OSError as error:
        if is_of_the_path(error):
            raise DataError(f"{cache_dir} cannot be made or written in: {error.strerror}: {advice}") from None
        raise RunError(
            f"the order of the samples was not written to {cache_dir}: {reason_of(error)}: make room, or {advice}"
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether all files of an order are there, as long as they were, and are arrays."""
    try:
        sizes = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        return all(_is_whole(folder / name, size) for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _is_whole(path: Path, size: int) -> bool:
    if path.stat().st_size != size:
        return False
    if path.suffix == ".npy":
        open_memmap(path, mode="r")  # raises where it is not; numpy.load would unpickle another kind of file
    return True


@contextlib.contextmanager
def new_order(folder: Path) -> Iterator[Path]:
    """A folder to build in, which becomes `folder` when the block ends well, and is gone when it fails.

    Raises:
        LlamaProError: as `naming_the_cache`.
    """
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        with naming_the_cache(folder.parent):
            _clear_old_drafts(folder.parent)
            draft.mkdir()
            yield draft
            sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
            (draft / _CONTENTS).write_text(json.dumps(sizes), encoding="utf-8")
            for path in (*draft.iterdir(), draft):
                sync(path)
            _move_into_place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move_into_place(draft: Path, folder: Path) -> None:
    """Another run may have built the same order, then or just now; its files are as good as ours."""
    damaged = draft.with_name(f"{draft.name}.damaged")
    if folder.exists() and not is_whole(folder):
        folder.rename(damaged)
    try:
        draft.rename(folder)
    except OSError:
        if not is_whole(folder):
            raise
    sync(folder.parent)
    shutil.rmtree(damaged, ignore_errors=True)


def _clear_old_drafts(cache_dir: Path) -> None:
    for path in cache_dir.glob(".order-*"):
        with contextlib.suppress(OSError):  # another run clears it too
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def unreadable(folder: Path, error: Exception) -> LlamaProError:
    """Of a rank that cannot read what the first one wrote."""
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"{folder} cannot be read, where the first rank wrote the order of the samples: {reason}: set data.cache_dir "
        "to a folder that all ranks share"
    )
