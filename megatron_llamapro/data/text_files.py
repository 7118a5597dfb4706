"""What an input file is, where it is no text or not one JSON object a line, and how to make it so.

Imports neither torch nor megatron, so that a wrong file is refused at once.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.config.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")

_PANDAS = 'import pandas; pandas.read_parquet({old}).to_json({new}, orient="records", lines=True, force_ascii=False)'
_ARROW = "import datasets; datasets.Dataset.from_file({old}).to_json({new}, force_ascii=False)"

# How a file begins, what it is then, and the command that makes text of it.
_BINARY = (
    (b"\x1f\x8b", "is compressed with gzip", "zcat {old} > {new}"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "zstdcat {old} > {new}"),
    (b"BZh", "is compressed with bzip2", "bzcat {old} > {new}"),
    (b"\xfd7zXZ\x00", "is compressed with xz", "xzcat {old} > {new}"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4", "lz4cat {old} > {new}"),
    (b"PK\x03\x04", "is a zip archive", "unzip -p {old} > {new}"),
    (b"PAR1", "is a Parquet table", f"python -c '{_PANDAS}'"),
    (b"ARROW1", "is an Arrow table", f"python -c '{_ARROW}'"),
    (b"\xff\xff\xff\xff", "is an Arrow table", f"python -c '{_ARROW}'"),
    (b"\xff\xfe\x00\x00", "is UTF-32 text, not UTF-8", "iconv -f UTF-32 -t UTF-8 {old} > {new}"),
    (b"\x00\x00\xfe\xff", "is UTF-32 text, not UTF-8", "iconv -f UTF-32 -t UTF-8 {old} > {new}"),
    (b"\xff\xfe", "is UTF-16 text, not UTF-8", "iconv -f UTF-16 -t UTF-8 {old} > {new}"),
    (b"\xfe\xff", "is UTF-16 text, not UTF-8", "iconv -f UTF-16 -t UTF-8 {old} > {new}"),
    (b"version https://git-lfs", "is a Git-LFS pointer, not the file itself", "git lfs pull"),
    (b"MMIDIDX", "is the index of token files, which are tokenized already", None),
    (b"SQLite format 3", "is a SQLite database", None),
)
_NOT_LINES = (
    (re.compile(rb"\["), "is a JSON list, not one object a line", "jq -c '.[]' {old} > {new}"),
    (
        re.compile(rb"\{\s*\n|[^\n]*[{\[,]\s*\n"),
        "is JSON over several lines, not one object a line",
        "jq -c . {old} > {new}",
    ),
)
_TAR_PLACE, _TAR = 257, b"ustar"
_LOOKED_AT = 4096


def is_jsonl(path: Path) -> bool:
    """Whether a file that may be plain text as well is, by its name, one JSON object a line."""
    return path.suffix.lower() in JSONL_SUFFIXES


def check_text_files(paths: Sequence[Path], *, jsonl: bool | None = None) -> None:
    """Raise `DataError` where a file is missing or is, by its first bytes, no text, or not one JSON object a line.

    Without `jsonl`, names tell which files are to be JSON.
    """
    for path in paths:
        _check_regular(path)
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT)
        found = _kind(start, jsonl=is_jsonl(path) if jsonl is None else jsonl)
        if found is not None:
            what, command = found
            old, new = (shlex.quote(str(name)) for name in (path, _new_name(path)))
            if command and command.startswith("python"):
                old, new = (f'"{name}"' for name in (path, _new_name(path)))
            advice = f", e.g. {command.format(old=old, new=new)}" if command else ""
            raise DataError(f"{path} {what}: give text{advice}")


def _check_regular(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the files in it, e.g. {path}/*.jsonl")
    if not path.exists():
        raise DataError(f"{path} is not there: give jsonl files, one document a line")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file: write what comes out of it to a file, and give that")


def _kind(start: bytes, *, jsonl: bool) -> tuple[str, str | None] | None:
    """What the file is and what to type, or None where it can be read."""
    for signature, what, command in _BINARY:
        if start.startswith(signature):
            return what, command
    if start[_TAR_PLACE:].startswith(_TAR):
        return "is a tar archive", "tar -xOf {old} > {new}"
    for place, order in ((1, "LE"), (0, "BE")):  # no mark, but letters of two bytes
        if len(start) > 8 and not any(start[place:8:2]) and all(start[1 - place : 8 : 2]):
            return "is UTF-16 text, not UTF-8", f"iconv -f UTF-16{order} -t UTF-8 {{old}} > {{new}}"
    if jsonl:
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        for pattern, what, command in _NOT_LINES:
            if pattern.match(text):
                return what, command
    return None


def _new_name(path: Path) -> Path:
    """A name that no file has, for the text of one: corpus.jsonl.gz becomes corpus.jsonl."""
    name = path.name.partition(".")[0] or "text"
    names = itertools.chain(["jsonl", "lines.jsonl"], (f"lines.{number}.jsonl" for number in itertools.count(2)))
    return next(new for new in (path.with_name(f"{name}.{ending}") for ending in names) if not new.exists())
