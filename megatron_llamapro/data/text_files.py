"""Text input: checks files before work starts, and reads single lines of JSON.

Imports neither torch nor megatron, so that a wrong file is refused at once.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.tokenizer import tokenizer_file

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")

_PANDAS = 'import pandas; pandas.read_parquet({old}).to_json({new}, orient="records", lines=True, force_ascii=False)'
_ARROW = "import datasets; datasets.Dataset.from_file({old}).to_json({new}, force_ascii=False)"

# The first bytes of a file, the kind of file they mean, and a command that turns it into text.
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
    """Whether a file holds one JSON object a line, by its name; else it is plain text."""
    return path.suffix.lower() in JSONL_SUFFIXES


def check_text_files(paths: Sequence[Path], *, jsonl: bool | None = None) -> None:
    """Raise `DataError` if a file is missing, or if it is, by its first bytes, not text or not jsonl.

    If `jsonl` is None, the files' names say which must be JSON.
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
        raise DataError(f"{path} does not exist: give jsonl files, one document a line")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file: write its output to a file, and give that")


def _kind(start: bytes, *, jsonl: bool) -> tuple[str, str | None] | None:
    """Return the kind of file and a command to convert it, or None if it can be read as it is."""
    for signature, what, command in _BINARY:
        if start.startswith(signature):
            return what, command
    if start[_TAR_PLACE:].startswith(_TAR):
        return "is a tar archive", "tar -xOf {old} > {new}"
    for place, order in ((1, "LE"), (0, "BE")):  # no byte-order mark, but two bytes a letter
        if len(start) > 8 and not any(start[place:8:2]) and all(start[1 - place : 8 : 2]):
            return "is UTF-16 text, not UTF-8", f"iconv -f UTF-16{order} -t UTF-8 {{old}} > {{new}}"
    if jsonl:
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        for pattern, what, command in _NOT_LINES:
            if pattern.match(text):
                return what, command
    return None


def _new_name(path: Path) -> Path:
    """Return an unused name for the text of a file: corpus.jsonl.gz becomes corpus.jsonl."""
    name = path.name.partition(".")[0] or "text"
    names = itertools.chain(["jsonl", "lines.jsonl"], (f"lines.{number}.jsonl" for number in itertools.count(2)))
    return next(new for new in (path.with_name(f"{name}.{ending}") for ending in names) if not new.exists())


_MOST_WORKERS = 1000


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """Return the paths of a prefix's .bin, its .idx and our side file."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def check_request(
    inputs: Sequence[Path], output_prefix: Path, *, tokenizer: Path, num_workers: int, overwrite: bool
) -> None:
    """Check the arguments of `preprocess` before work starts.

    Raises:
        DataError: an input or the tokenizer is missing, an input is not jsonl, the output would replace an input or
            (unless `overwrite`) existing token files, or the number of workers is out of range.
    """
    if not 1 <= num_workers <= _MOST_WORKERS:
        raise DataError(f"--num_workers is {num_workers}: give a number of processes from 1 to {_MOST_WORKERS}")
    read = {path.resolve() for path in inputs}
    for path in paths_of(output_prefix):
        if path.resolve() in read:
            raise DataError(f"{path} is an input and would be overwritten: choose another --output_prefix")
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists: choose another --output_prefix, or give --overwrite")
    check_text_files(inputs, jsonl=True)
    tokenizer_file(tokenizer)


_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_NAMES, _MOST_LETTERS = 10, 40
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def json_name(value: object) -> str:
    """Return JSON's name for the type of a value."""
    return _JSON_NAMES.get(type(value), "a number")


def shown(names: Iterable[str]) -> str:
    """Format field names for an error, in one line: the first few, each quoted and cut to length."""
    quoted = [repr(name[:_MOST_LETTERS]) for name in names]
    more = [f"{len(quoted) - _MOST_NAMES} more"] if len(quoted) > _MOST_NAMES else []
    return ", ".join([*quoted[:_MOST_NAMES], *more])


def field_of(line: bytes, key: str, where: str) -> object:
    """Return the field `key` of the JSON object in `line`. `where` names the line in errors.

    Raises:
        DataError: the line is not UTF-8, not JSON, not an object, or has no such field.
    """
    record = _parsed(line, where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: {json_name(record)}, not an object with the field {key!r}")
    if key not in record:
        there = f"but {shown(record)}" if record else "the object is empty"
        raise DataError(f"{where}: no field {key!r}, {there}: name the field to read with --json_key")
    return record[key]


def decoded(line: bytes, where: str) -> str:
    """Return the text of a line. Raise `DataError` if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start + 1}") from None


def valid_unicode(text: str) -> str:
    """Return `text` itself, or with U+FFFD in place of lone surrogates, as decoders do. JSON can escape lone
    surrogates, but no tokenizer accepts them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def _parsed(line: bytes, where: str) -> object:
    text = decoded(line, where).rstrip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = ": the line ends too early" if error.pos >= len(text) else ""
        what = error.msg.removesuffix(" at")
        raise DataError(f"{where}: not JSON: {what} at column {error.colno}{cut}") from None
    except RecursionError:
        raise DataError(f"{where}: its lists and objects are nested too deeply") from None
    except ValueError:  # sys.get_int_max_str_digits
        raise DataError(f"{where}: holds an integer of thousands of digits: leave its field out") from None
