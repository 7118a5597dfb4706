"""Side files: a model's files besides its weights and configuration, such as its tokenizer and license.

They are copied unchanged to every checkpoint that is made of the model, also to those of a training run. Code is
copied, never run. The model's own code is not copied: see `without_code`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import check_small, file_inside, read_inside

_NOTICES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # licenses require that they are copied; no program reads them

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.*.json",  # "fast_tokenizer_files" in tokenizer_config.json: one for each version of transformers
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's
    "tekken.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    *_NOTICES,
)
"""Patterns of file names."""

_AUTO_MAP, _AUTO_TOKENIZER = "auto_map", "AutoTokenizer"


def copy_side_files(source: Path, target: Path, *, config: Mapping | None = None) -> None:
    """Copy the `side_files` of a folder. Raises what `side_files` raises."""
    for name, path in side_files(source, config=config).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)


def copy_notices(source: Path, target: Path) -> None:
    """Copy the licenses and notices of a folder. Raises what `side_files` raises."""
    left_out = notices_left_out(source)
    for path in (path for pattern in _NOTICES for path in sorted(source.glob(pattern))):
        if path.name not in left_out and file_inside(source, path.name) is not None:
            check_small(path, path.stat().st_size)
            shutil.copyfile(path, target / path.name)


def side_files(folder: Path, *, config: Mapping | None = None) -> dict[str, Path]:
    """Return, by name, the `SIDE_FILES` of a folder and the code of a tokenizer that transformers does not have.

    `notices_left_out` are not included. `config` is the folder's config.json, if it was already read.

    Raises:
        CheckpointError: a file is absurdly large, is only a Git LFS pointer, or is a link out of the folder (a copy
            would publish another file).
    """
    found: dict[str, Path] = {}
    left_out = notices_left_out(folder)
    for name in [*_names(folder), *_tokenizer_code(folder, config)]:
        if name not in left_out and (path := file_inside(folder, name)) is not None:
            check_small(path, path.stat().st_size)
            found[name] = path
    return found


def notices_left_out(folder: Path) -> tuple[str, ...]:
    """Return the names of licenses and notices that are links out of the folder or to nothing, e.g. to a license that
    several models share. The model is complete without them."""
    links = (path for pattern in _NOTICES for path in folder.glob(pattern) if path.is_symlink())
    return tuple(sorted(path.name for path in links if not _is_inside(path)))


def _is_inside(link: Path) -> bool:
    try:
        file_inside(link.parent, link.name)
    except CheckpointError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    """Return the names of `SIDE_FILES`, with wildcards replaced by the files that match.

    A name without a wildcard is included even if it does not exist, because a link to nothing is an error. Hidden
    files are left out: they belong to other programs, such as macOS' `._name` beside each file.
    """
    plain = [name for name in SIDE_FILES if "*" not in name]
    found = [path for pattern in SIDE_FILES if "*" in pattern for path in folder.glob(pattern)]
    return [*plain, *sorted(str(path.relative_to(folder)) for path in found if not path.name.startswith("."))]


def without_code(config: Mapping) -> dict:
    """Return a model's configuration without references to the model repository's own code, except the tokenizer's.

    Every supported family exists in transformers. It is converted and trained as that family, and loaded as that family
    unless the user trusts remote code. A user who does would need files that are not copied, and would get another
    forward pass than the trained one.
    """
    kept = {key: value for key, value in config.items() if key != _AUTO_MAP}
    classes = config.get(_AUTO_MAP)
    if isinstance(classes, Mapping) and _AUTO_TOKENIZER in classes:
        kept[_AUTO_MAP] = {_AUTO_TOKENIZER: classes[_AUTO_TOKENIZER]}
    return kept


def _tokenizer_code(folder: Path, config: Mapping | None) -> list[str]:
    """Return the names of the files with the tokenizer's own classes: those that its configuration names, and the
    files beside them that they import, as transformers follows the imports."""
    modules = [
        module
        for content in (_content(folder, "tokenizer_config.json"), config or _content(folder, "config.json"))
        for reference in _tokenizer_classes(content)
        if (module := _module(reference))
    ]
    found: list[str] = []
    while modules:
        name = f"{modules.pop()}.py"
        content = None if name in found else read_inside(folder, name)
        if content is not None:
            found.append(name)
            modules += _imported(content.decode(errors="replace"))
    return found


def _content(folder: Path, name: str) -> object:
    """Return the content of a JSON file, or None if it does not exist or is damaged."""
    content = read_inside(folder, name)
    try:
        return None if content is None else json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _tokenizer_classes(content: object) -> list[object]:
    """Return the references to the slow and the fast class. Either may be missing."""
    classes = content.get(_AUTO_MAP) if isinstance(content, Mapping) else None
    if isinstance(classes, Mapping):
        classes = classes.get(_AUTO_TOKENIZER)
    return classes if isinstance(classes, list) else [classes]


def _module(reference: object) -> str | None:
    """Return the module in the same folder that a reference MODULE.CLASS names, or None for OWNER/NAME--MODULE.CLASS,
    which is in another repository."""
    match = re.fullmatch(r"(\w+)\.\w+", reference) if isinstance(reference, str) else None
    return match and match[1]


def _imported(code: str) -> list[str]:
    return re.findall(r"^[ \t]*(?:from|import)[ \t]+\.(\w+)[ \t\r]*(?:import\b.*)?$", code, flags=re.MULTILINE)
