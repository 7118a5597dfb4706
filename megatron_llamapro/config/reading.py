"""Conversion of plain data into the values of a configuration's fields, by their types. Imports no torch.

Only the dataclasses say which values are valid. The error for an invalid value is one line: the value given, the
values allowed, and what to type.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from megatron_llamapro.config.documents import DocumentError, load
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.fields import (
    alternatives_of,
    fields_of,
    is_file_path,
    is_optional,
    required_of,
    suggestion,
)
from megatron_llamapro.config.values import LARGEST_FLOAT, LARGEST_INT, printable, spelled_as

# Values of an optional path that nobody means as a folder's name.
_NO_PATH = {"~": "write ~/ for the home folder, or null for none", "None": "write null for none"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Place:
    """The place of a value in a configuration."""

    root: type
    """Class of the whole configuration."""
    source: str
    """Start of an error: `FILE: `, or the dashes of an option."""
    name: str = ""
    """Dotted name, from the root."""

    def __str__(self) -> str:
        return printable(f"{self.source}{self.name}")

    def under(self, name: str) -> Place:
        """Return the place of one of its fields."""
        return dataclasses.replace(self, name=f"{self.name}.{name}" if self.name else name)

    def at(self, index: int) -> Place:
        """Return the place of one of its items."""
        return dataclasses.replace(self, name=f"{self.name}[{index}]")

    @property
    def dashes(self) -> str:
        """What stands before its name where it is typed; nothing in a file."""
        return self.source if self.source == "--" else ""

    def is_unknown(self) -> NoReturn:
        """Raise the `ConfigError` for a name that does not exist."""
        raise ConfigError(f"{self} does not exist{suggestion(self.root, self.name, dashes=self.dashes)}")

    def refuse(self, value: object, what: str) -> NoReturn:
        """Raise the `ConfigError` for an invalid value. `what` says what to write."""
        raise ConfigError(f"{self} is {shown(value)}: {what}")


def shown(value: object) -> str:
    """Return a value as a user would write it, cut if it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _SHORT.repr(value)


def read_value(kind: Any, value: object, place: Place) -> Any:
    """Return `value` as a field of type `kind` holds it, in plain data: only the given fields of a section, a list for
    a tuple, and the field's own spelling of a dtype.

    Raises:
        ConfigError: the value does not have this type.
    """
    if isinstance(value, str) and value in _NO_PATH and is_optional(kind) and is_file_path(kind):
        place.refuse(value, _NO_PATH[value])
    if (value is None or value == "~") and is_optional(kind):
        return None
    errors = []
    for alternative in alternatives_of(kind):
        try:
            if alternative is not type(None):
                return _read(alternative, value, place)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def read_text(kind: Any, text: str, place: Place) -> Any:
    """Read a command line's `text` as in `read_value`. It is YAML, unless the field holds text."""
    if text == "null" and is_optional(kind):
        return None
    if str in alternatives_of(kind) or get_origin(kind) is Literal:
        return read_value(kind, text, place)
    if text.lstrip()[:1] not in ("[", "{"):
        return read_value(kind, _loaded(text), place)
    try:
        return read_value(kind, load(text), place)
    except DocumentError as error:
        raise ConfigError(f"{place} is {shown(text)}: {error}") from None


def _loaded(value: object) -> object:
    """Return the YAML value of text. Text that is not YAML stays as it is."""
    try:
        return load(value) if isinstance(value, str) else value
    except ConfigError:
        return value


def _read(kind: Any, value: object, place: Place) -> Any:
    if fields_of(kind):
        return _read_fields(kind, value, place)
    read = _READERS[get_origin(kind) or kind]
    return read(value, place, *([get_args(kind)] if get_args(kind) else []))


def _read_fields(kind: Any, value: object, place: Place) -> dict:
    hints = fields_of(kind)
    is_entry = place.name.endswith("]")
    if value is None and not is_entry:  # a section whose lines are all comments
        return {}
    if not isinstance(value, dict):
        first = next(iter(hints))
        if is_entry:
            place.refuse(value, f"it must be a mapping: write {{{first}: {value if _is_word(value) else '…'}}}")
        place.refuse(value, f"it is a section: set its fields, e.g. {place.dashes}{place.under(first).name}")
    for name in value:
        if name not in hints:
            place.under(name if isinstance(name, str) else shown(name)).is_unknown()
    required = required_of(kind)
    given = (
        value if is_entry else {name: each for name, each in value.items() if each is not None or name not in required}
    )
    read = {name: read_value(hints[name], each, place.under(name)) for name, each in given.items()}
    for name in required if is_entry else ():
        if name not in read:
            raise ConfigError(f"{place} has no {name}: write {{{name}: …}}")
    return read


def _read_str(value: object, place: Place) -> str:
    if value is None:
        place.refuse(value, "give it a value")
    if not isinstance(value, str):
        example = f"'{value}'" if isinstance(value, (int, float)) and not isinstance(value, bool) else "it in quotes"
        place.refuse(value, f"it must be text: write {example}")
    try:
        value.encode()
    except UnicodeEncodeError:
        place.refuse(value, "it is not UTF-8")
    return value


def _read_bool(value: object, place: Place) -> bool:
    value = _loaded(value)
    if not isinstance(value, bool):
        place.refuse(value, "it must be true or false")
    return value


def _read_int(value: object, place: Place) -> int:
    value = _loaded(value)
    if isinstance(value, bool) or not isinstance(value, int):
        is_whole = isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_INT
        place.refuse(value, f"it must be a whole number{f': write {value:.0f}' if is_whole else ''}")
    if abs(value) > LARGEST_INT:
        place.refuse(value, "it is too large")
    return value


def _read_float(value: object, place: Place) -> float:
    value = _loaded(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        place.refuse(value, "it must be a number, e.g. 2e-4")
    if isinstance(value, int):
        value = _read_int(value, place)
    if not math.isfinite(value):
        place.refuse(value, "it must be finite")
    if abs(value) > LARGEST_FLOAT:
        place.refuse(value, "it is too large")
    return float(value)


def _read_choice(value: object, place: Place, choices: tuple) -> str:
    if isinstance(value, str) and spelled_as(choices, value) in choices:
        return spelled_as(choices, value)
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    place.refuse(value, f"it must be {' or '.join(filter(None, (', '.join(choices[:-1]), choices[-1])))}{hint}")


def _read_list(value: object, place: Place, kinds: tuple) -> list:
    kind = kinds[0]
    if not isinstance(value, (list, tuple)):
        first = next(iter(fields_of(kind)), None)
        item = str(value) if _is_word(value) else "…"
        words = ", ".join(word.strip() for word in re.split(r"[,\s]+" if kind is int else ",", item) if word.strip())
        form = f"[{{{first}: {item}}}]" if first else f"[{words}]"
        place.refuse(value, f"it must be a list: write {form}")
    return [read_value(kind, item, place.at(index)) for index, item in enumerate(value)]


def _read_names(value: object, place: Place, kinds: tuple) -> dict:
    if not isinstance(value, dict):
        place.refuse(value, "it must be a mapping: write {NAME: …}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"{place} has the name {shown(name)}, which is not text: write it in quotes")
    return {name: read_value(kinds[1], item, place.under(name)) for name, item in value.items()}


def _is_word(value: object) -> bool:
    """Whether a value can be part of an example of what to type."""
    return (
        isinstance(value, (str, int, float))
        and not isinstance(value, bool)
        and len(str(value)) <= 60
        and str(value).isprintable()
    )


_READERS: dict[Any, Callable] = {
    str: _read_str,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    Literal: _read_choice,
    tuple: _read_list,
    dict: _read_names,
}
