"""Safe reading of files, atomic writing, and hints about wrong paths.

Errors name the file. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError, ConfigError, LlamaProError

POINTER_START = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder, then try again"
_LARGEST_POINTER = 1024  # bytes; Git-LFS's own limit

_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")


def file_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file in a checkpoint folder, or None if it does not exist.

    A link may not lead out of the folder, except into the blobs of the Hugging Face cache that the folder lies in.

    Raises:
        CheckpointError: the file is a link to elsewhere or in a loop, not a regular file (reading a pipe would wait),
            or only a Git-LFS pointer.
    """
    path = _regular_file(folder, name)
    if path is not None:
        check_fetched(path)
    return path


def _regular_file(folder: Path, name: str) -> Path | None:
    path = Path(folder) / name
    try:
        mode = path.stat().st_mode
        real, home = path.resolve(strict=True), Path(folder).resolve()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which does not exist: copy models with `cp -rL`, mount "
                "the whole cache, or fetch the model again"
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
    return path


def _instead_of_link(folder: Path, real: Path) -> str:
    """Advise on a link that is not followed. huggingface_hub before 0.23 made folders of links to its cache."""
    repository = real.parent.parent
    if real.parent.name != "blobs" or not repository.name.startswith("models--"):
        return "copy the file into the folder, then try again"
    hub_id = repository.name.removeprefix("models--").replace("--", "/")
    return f"copy the folder with `cp -rL {folder} NEW`, or fetch it with `hf download {hub_id} --local-dir NEW`"


def _is_blob_of(home: Path, real: Path) -> bool:
    """Whether a file is a blob of the Hugging Face cache that a folder lies in. Both paths are resolved.

    The folder is REPOSITORY/snapshots/REVISION or below it. The blob is REPOSITORY/blobs/ETAG, or since huggingface_hub
    2.0, CACHE/blobs/<2 hex digits>/<64 hex digits>, a store that all repositories of the cache share.
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
    """Raise `error` if a file is only the pointer that Git-LFS keeps until the file is pulled."""
    with Path(path).open("rb") as file:
        is_small = os.fstat(file.fileno()).st_size <= _LARGEST_POINTER
        if is_small:
            check_no_pointer(path, file.read(len(POINTER_START)), error=error)


def check_no_pointer(path: Path, start: bytes, *, error: type[LlamaProError] = CheckpointError) -> None:
    """Raise `error` if a file that starts with `start` is only the pointer that Git-LFS keeps in its place."""
    if start.startswith(POINTER_START):
        raise error(f"{path} {IS_POINTER}")


LARGEST_SMALL_FILE = 256 * 2**20
"""Bytes. Configurations, manifests, tokenizers and indices are far smaller. (A sparse terabyte needs no disk.)"""


def read_small(path: Path, *, largest: int = LARGEST_SMALL_FILE) -> bytes:
    """Read a whole file, unless it is too large for its kind.

    Raises:
        CheckpointError: the file is larger than `largest` bytes. It is not read into memory.
    """
    with Path(path).open("rb") as file:
        check_small(path, os.fstat(file.fileno()).st_size, largest=largest)
        return file.read()


def read_inside(folder: Path, name: str, *, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
    """Read a small file of a checkpoint folder. It is opened once. Return None if `file_inside` finds none. Raises the
    same errors as `file_inside` and `read_small`."""
    path = _regular_file(folder, name)
    if path is None:
        return None
    data = read_small(path, largest=largest)
    if len(data) <= _LARGEST_POINTER:
        check_no_pointer(path, data)
    return data


def check_small(path: Path, num_bytes: int, *, largest: int = LARGEST_SMALL_FILE) -> None:
    """Raise `CheckpointError` if a file is larger than `largest` bytes."""
    if num_bytes > largest:
        raise CheckpointError(f"{path} has {num_bytes} bytes, more than any such file: it is damaged")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that a kill leaves the old file or none."""
    draft = path.with_name(f"{path.name}.tmp")
    with naming(path):
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return JSON that every program can read: null stands for a float that is not finite."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def write_json(path: Path, value: object) -> None:
    """Write `json_text`, indented, atomically."""
    write_atomically(path, json_text(value, indent=1) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_can_hold(path: Path | None) -> None:
    """Raise `ConfigError` if no file can be written at `path`. Call it before computing the content."""
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: the folder {path.parent} does not exist")


def check_output(path: Path | None, *, overwrite: bool) -> None:
    """Raise `ConfigError` if a file cannot be written there, or exists and may not be replaced."""
    check_can_hold(path)
    if path is not None and path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: choose another file, or give --overwrite")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an `OSError` of the block name `path`, for operations on an open descriptor or a draft."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


_MOST = 3  # folders named in one line

# With or without the hub's address before it. `Path` removes one of the address's slashes.
_HUB_ID = re.compile(r"(?:hf:/+|(?:https?:/+)?(?:huggingface|hf)\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:/tree/[\w.-]+)?")
_PARTS_OF_A_REPOSITORY = ("snapshots", "blobs", "refs", ".no_exist")
_CONFIG = "config.json"
_CACHED_MODEL = re.compile(r"models--(.+)")


def hint_where_nothing_is(path: Path) -> str | None:
    """Return a hint for a path that does not exist or is not a folder; None if there is none."""
    path = Path(path)
    if path.is_file():
        is_in_model = _has(path.parent, _CONFIG)
        return f"give the folder that it is in, {path.parent}" if is_in_model else hint_inside(path.parent, _CONFIG)
    if (broken := broken_link(path)) is not None:
        return broken
    match = _HUB_ID.fullmatch(str(path))
    if match is None or Path(match[1]).parent.exists():
        return None
    return f"if it is a model of the Hugging Face hub, `hf download {match[1]}` fetches it and prints the folder"


def broken_link(path: Path) -> str | None:
    """Describe the first link in a path that is broken or circular. Return None if there is none."""
    for part in (Path(path), *Path(path).parents):
        if part.is_symlink() and not part.exists():
            return f"{part} is a broken link to {part.readlink()}"
    return None


def hint_inside(folder: Path, name: str) -> str | None:
    """Return a hint for a folder without the file `name`, for example a cache or a parent folder of models."""
    folder = Path(folder)
    repository = folder.parent if folder.name in _PARTS_OF_A_REPOSITORY else folder
    if (repository / "snapshots").is_dir():
        return _snapshots(repository)
    cache = folder / "hub" if (folder / "hub").is_dir() else folder
    models = [path for path in _folders(cache) if _CACHED_MODEL.fullmatch(path.name)]
    if models:
        return f"it is the Hugging Face cache: give a folder {cache}/MODEL/snapshots/REVISION; it holds {_some(models)}"
    below = [path for path in _folders(folder) if _has(path, name)]
    if below:
        return f"give the folder in it that has one: {_some(below, whole=True)}"
    return fetch_rest(folder)


def fetch_rest(folder: Path) -> str | None:
    """Return a hint for a folder of the Hugging Face cache that lacks a file of its model."""
    hub_id = _hub_id_of(folder)
    return hub_id and f"`hf download {hub_id}` fetches the rest"


def _snapshots(repository: Path) -> str:
    hub_id = _hub_id_of(repository) or "ID"
    found = _folders(repository / "snapshots")
    if not found:
        return f"it is part of the Hugging Face cache, without a snapshot: `hf download {hub_id}` fetches one"
    main = repository / "refs" / "main"
    newest = read_small(main, largest=1000).decode(errors="replace").strip() if main.is_file() else ""
    found.sort(key=lambda path: path.name != newest)
    which = "its snapshot" if len(found) == 1 else "one of its snapshots (main's first)"
    return f"it is part of the Hugging Face cache: give {which}, {_some(found, whole=True)}"


def _hub_id_of(folder: Path) -> str | None:
    """Return owner/name of the model whose Hugging Face cache folder `folder` is or lies in."""
    for path in (Path(folder).absolute(), *Path(folder).absolute().parents):
        if match := _CACHED_MODEL.fullmatch(path.name):
            return match[1].replace("--", "/")
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _has(folder: Path, name: str) -> bool:
    """Whether a folder has a file. Also False if that cannot be known, since a hint must not fail."""
    try:
        return (folder / name).is_file()
    except OSError:
        return False


def _some(paths: list[Path], *, whole: bool = False) -> str:
    shown = ", ".join(str(path) if whole else path.name for path in paths[:_MOST])
    return f"{shown} and {len(paths) - _MOST} more" if len(paths) > _MOST else shown
