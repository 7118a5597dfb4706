"""What a path is that is no model's folder, and what to give instead. Looks at names, opens no weights; no torch."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_llamapro.config.files import read_small

_MOST = 3  # folders that a line names

# With or without the hub's address before it; a path has lost one of its slashes.
_HUB_ID = re.compile(r"(?:hf:/+|(?:https?:/+)?(?:huggingface|hf)\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:/tree/[\w.-]+)?")
_PARTS_OF_A_REPOSITORY = ("snapshots", "blobs", "refs", ".no_exist")
_CONFIG = "config.json"
_CACHED_MODEL = re.compile(r"models--(.+)")


def hint_where_nothing_is(path: Path) -> str | None:
    """For a path that is no folder, or none that exists."""
    path = Path(path)
    if path.is_file():
        is_in_model = _has(path.parent, _CONFIG)
        return f"give the one that it lies in, {path.parent}" if is_in_model else hint_inside(path.parent, _CONFIG)
    if (broken := broken_link(path)) is not None:
        return broken
    match = _HUB_ID.fullmatch(str(path))
    if match is None or Path(match[1]).parent.exists():
        return None
    return f"if it is a model of the Hugging Face hub, `hf download {match[1]}` fetches it and says the folder to give"


def broken_link(path: Path) -> str | None:
    """What is wrong where a path is, or passes through, a link that leads nowhere or in a circle; else None."""
    for part in (Path(path), *Path(path).parents):
        if part.is_symlink() and not part.exists():
            return f"{part} is a link that leads nowhere, to {part.readlink()}"
    return None


def hint_inside(folder: Path, name: str) -> str | None:
    """For a folder without the file `name`: where the model is, whose cache or parent it may be."""
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
    """For a folder of the Hugging Face cache that lacks a file of its model."""
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
    """owner/name of a folder of the Hugging Face cache, or of one in it."""
    for path in (Path(folder).absolute(), *Path(folder).absolute().parents):
        if match := _CACHED_MODEL.fullmatch(path.name):
            return match[1].replace("--", "/")
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _has(folder: Path, name: str) -> bool:
    """False where that may not be known, too: a hint is no place to fail."""
    try:
        return (folder / name).is_file()
    except OSError:
        return False


def _some(paths: list[Path], *, whole: bool = False) -> str:
    shown = ", ".join(str(path) if whole else path.name for path in paths[:_MOST])
    return f"{shown} and {len(paths) - _MOST} more" if len(paths) > _MOST else shown
