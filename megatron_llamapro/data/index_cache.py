"""The order of the samples on disk: megatron.core's index files, one folder per order, which is complete or not used.

megatron.core writes the files in place, and later trusts any file that it finds. This module builds them in a draft
folder, and renames it when all files are on the disk. A folder that lacks a file or has a truncated one is built
again. Only the first rank checks and builds.
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

from megatron_llamapro.config.drafts import is_of_the_path, reason_of, sync
from megatron_llamapro.config.errors import DataError, LlamaProError, RunError

_CONTENTS = "files.json"
"""Names and sizes of the other files; written last."""
_OLD_SECONDS = 24 * 60 * 60.0
"""A draft of this age is from a run that was killed: no build takes this long. (Not all file systems have locks.)"""


def make_cache_dir(cache_dir: Path) -> None:
    """Make the folder if it is missing. Raise `LlamaProError` if that fails."""
    with naming_the_cache(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def naming_the_cache(cache_dir: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into an error that names the cache.

    Raises:
        DataError: the path is no folder, or not writable.
        RunError: any other failure, for example a full disk, which a restart may not hit.
    """
    advice = "set data.cache_dir to a folder for the order of the samples"
    try:
        yield
    except OSError as error:
        if is_of_the_path(error):
            raise DataError(f"{cache_dir} cannot be created or written to: {error.strerror}: {advice}") from None
        raise RunError(
            f"the order of the samples was not written to {cache_dir}: {reason_of(error)}: make room, or {advice}"
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether all files of an order exist, have their recorded sizes, and are arrays."""
    try:
        sizes = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        return all(_is_whole(folder / name, size) for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _is_whole(path: Path, size: int) -> bool:
    if path.stat().st_size != size:
        return False
    if path.suffix == ".npy":
        open_memmap(path, mode="r")  # raises if it is no array; numpy.load would unpickle other files
    return True


@contextlib.contextmanager
def new_order(folder: Path) -> Iterator[Path]:
    """Yield a folder to build in. It becomes `folder` if the block succeeds, and is removed if it fails.

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
    """Rename `draft` to `folder`. If another run has built the same order meanwhile, keep its files: they are equal."""
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
        with contextlib.suppress(OSError):  # another run may clear it at the same time
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def unreadable(folder: Path, error: Exception) -> LlamaProError:
    """Return the error of a rank that cannot read the first rank's files."""
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"{folder}, where the first rank wrote the order of the samples, cannot be read: {reason}: set data.cache_dir "
        "to a folder that all ranks share"
    )
