"""One line of a jsonl file to the field that is wanted, or one line that says what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from megatron_llamapro.config.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_NAMES, _MOST_LETTERS = 10, 40
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def json_name(value: object) -> str:
    """What JSON calls a value."""
    return _JSON_NAMES.get(type(value), "a number")


def shown(names: Iterable[str]) -> str:
    """Names of fields in an error: a few of them, each in quotes, cut and in one line."""
    quoted = [repr(name[:_MOST_LETTERS]) for name in names]
    more = [f"{len(quoted) - _MOST_NAMES} more"] if len(quoted) > _MOST_NAMES else []
    return ", ".join([*quoted[:_MOST_NAMES], *more])


def field_of(line: bytes, key: str, where: str) -> object:
    """What an object has under `key`.

    Raises:
        DataError: the line, which is at `where`, is not UTF-8, not JSON, no object, or has no such field.
    """
    record = _parsed(line, where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: {json_name(record)}, not an object with the field {key!r}")
    if key not in record:
        there = f"but {shown(record)}" if record else "the object is empty"
        raise DataError(f"{where}: no field {key!r}, {there}: name the field to read with --json_key")
    return record[key]


def decoded(line: bytes, where: str) -> str:
    """The text of a line. Raises `DataError` where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start + 1}") from None


def valid_unicode(text: str) -> str:
    """`text` itself, or where it has lone surrogates, which JSON may escape and no tokenizer takes, a text with U+FFFD
    in their places, as decoders write."""
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
        raise DataError(f"{where}: its lists and objects are nested too deep") from None
    except ValueError:  # sys.get_int_max_str_digits
        raise DataError(f"{where}: holds an integer of thousands of digits: leave its field out") from None
