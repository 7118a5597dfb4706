"""Files read without being led astray and written whole or not at all; errors that name the file. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError, ConfigError, LlamaProError

POINTER_START = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder, then try again"
_LARGEST_POINTER = 1024  # bytes, as Git-LFS itself has it

_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")


def file_inside(folder: Path, name: str) -> Path | None:
    """The file of a checkpoint folder; None where it has none of that name.

    Links are followed, but not out of the folder: only into the blobs of the Hugging Face cache that it lies in.

    Raises:
        CheckpointError: it is a link to somewhere else or in a loop, no regular file (reading a pipe would wait), or
            only a Git-LFS pointer.
    """
    path = Path(folder) / name
    try:
        mode = path.stat().st_mode
        real, home = path.resolve(strict=True), Path(folder).resolve()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to a file that is not there, {path.readlink()}: copy models with `cp -rL`, mount "
                "the whole cache, or fetch it again"
            ) from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop, in Python before 3.13
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be opened: {reason}") from None
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file")
    if home not in real.parents and not _is_blob_of(home, real):
        raise CheckpointError(f"{path} is a link out of its folder, to {real}: {_instead_of_link(Path(folder), real)}")
    check_fetched(path)
    return path


def _instead_of_link(folder: Path, real: Path) -> str:
    """What to do about a link that is not followed. huggingface_hub before 0.23 made folders of links to its cache."""
    repository = real.parent.parent
    if real.parent.name != "blobs" or not repository.name.startswith("models--"):
        return "copy the file there, then try again"
    hub_id = repository.name.removeprefix("models--").replace("--", "/")
    return f"copy the folder with `cp -rL {folder} NEW`, or fetch it with `hf download {hub_id} --local-dir NEW`"


def _is_blob_of(home: Path, real: Path) -> bool:
    """Whether a file is a blob of the Hugging Face cache that a folder lies in (both without links).

    The folder is REPOSITORY/snapshots/REVISION or below it, the blob REPOSITORY/blobs/ETAG; or, since huggingface_hub
    2.0, in the store that all repositories of the cache share: CACHE/blobs/<2 hex digits>/<64 hex digits>.
    """
    for snapshot in (home, *home.parents):
        if snapshot.parent.name != "snapshots":
            continue
        repository = snapshot.parent.parent
        shared = repository.parent / "blobs"
        if repository / "blobs" in real.parents:
            return True
        if _CACHED_REPOSITORY.fullmatch(repository.name) and shared in real.parents:
            return _SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()) is not None
    return False


def check_fetched(path: Path, *, error: type[LlamaProError] = CheckpointError) -> None:
    """Raise `error` where a file is only what Git-LFS keeps in its place until it is pulled."""
    with Path(path).open("rb") as file:
        is_small = os.fstat(file.fileno()).st_size <= _LARGEST_POINTER
        if is_small and file.read(len(POINTER_START)) == POINTER_START:
            raise error(f"{path} {IS_POINTER}")


LARGEST_SMALL_FILE = 256 * 2**20
"""Bytes: configurations, manifests, tokenizers and indices are far below it. A hole of a terabyte takes no disk."""


def read_small(path: Path, *, largest: int = LARGEST_SMALL_FILE) -> bytes:
    """All of a file, which is not given memory if it is larger than any of its kind.

    Raises:
        CheckpointError: it is.
    """
    with Path(path).open("rb") as file:
        check_small(path, os.fstat(file.fileno()).st_size, largest=largest)
        return file.read()


def check_small(path: Path, num_bytes: int, *, largest: int = LARGEST_SMALL_FILE) -> None:
    """Raise `CheckpointError` for a size that no small file has."""
    if num_bytes > largest:
        raise CheckpointError(f"{path} has {num_bytes} bytes, more than any such file: it is damaged")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under another name first, so that a kill leaves the old one, or none."""
    draft = path.with_name(f"{path.name}.tmp")
    with naming(path):
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


def check_can_hold(path: Path | None) -> None:
    """Raise `ConfigError` where no file of this name can be written, before what goes into it is worked out."""
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: the folder {path.parent} does not exist")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of what is done through an open descriptor, or to a draft, names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
