"""The fields of a configuration, from the types of its dataclasses, and their construction from plain data. No torch.

An unknown name is an error that suggests the nearest name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.values import expand_user, printable

_UNIONS = (Union, types.UnionType)

FilePath = Annotated[str, "path"]
"""Path of a file or folder. `~` at its start is the home folder, both in files and on the command line."""


def is_file_path(kind: Any) -> bool:
    """Whether a field is a `FilePath`, or may be one."""
    return kind == FilePath or any(map(is_file_path, get_args(kind) if get_origin(kind) in _UNIONS else ()))


@functools.cache
def fields_of(kind: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, with annotations. Return no fields for any other type."""
    return get_type_hints(kind, include_extras=True) if dataclasses.is_dataclass(kind) else {}


def required_of(kind: Any) -> list[str]:
    """Return the names of the fields without a default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing and not fields_of(fields_of(kind)[field.name])
    ]


def alternatives_of(kind: Any) -> tuple:
    """Return the members of a union, without annotations. Any other type is its only member."""
    if get_origin(kind) is Annotated:
        return alternatives_of(get_args(kind)[0])
    if get_origin(kind) in _UNIONS:
        return tuple(member for part in get_args(kind) for member in alternatives_of(part))
    return (kind,)


def is_optional(kind: Any) -> bool:
    """Whether a value may be null."""
    return type(None) in alternatives_of(kind)


def items_of(kind: Any) -> Any:
    """Return the type of a list's items or a dict's values; None for any other type."""
    for alternative in alternatives_of(kind):
        if get_origin(alternative) is tuple:
            return get_args(alternative)[0]
        if get_origin(alternative) is dict:
            return get_args(alternative)[1]
    return None


def names_of(kind: Any) -> dict[str, Any]:
    """Return the dotted names and types of all sections and fields, from the top."""
    found = {}
    for name, of_field in fields_of(kind).items():
        found[name] = of_field
        found |= {f"{name}.{inner}": of_inner for inner, of_inner in names_of(of_field).items()}
    return found


def entry_fields_of(kind: Any) -> Iterator[tuple[str, str]]:
    """Yield the dotted name of each list whose items have fields, paired with each of these fields."""
    for name, of_field in names_of(kind).items():
        for inner in fields_of(items_of(of_field)):
            yield name, inner


_INDEX = re.compile(r"\[\d+\]")
_AT_MOST = 3


def suggestion(kind: Any, name: str, *, dashes: str = "") -> str:
    """Return the text to add to the error that the dotted `name` does not exist in the configuration `kind`: the
    nearest names, or all names of the section. `dashes` are written before an option."""
    near = nearest(kind, name, in_entry=not dashes and name.rpartition(".")[0].endswith("]"))
    if near:
        forms = (f"{dashes}{each.replace(': ', '=', 1) if dashes else each}" for each in near)
        return f": did you mean {' or '.join(forms)}?"
    known = names_of(kind)
    section = _INDEX.sub("", name).rpartition(".")[0]
    while section and section not in known:
        section = section.rpartition(".")[0]
    if not section:
        anchor = "" if dashes else "; put an anchor (&x) where its value is first used"
        return f": the top level takes {', '.join(fields_of(kind))}{anchor}"
    takes = fields_of(known[section]) or fields_of(items_of(known[section]))
    return f": {section} takes {', '.join(takes)}" if takes else ""


def nearest(kind: Any, name: str, *, in_entry: bool) -> list[str]:
    """Return existing dotted names, best first: the same name in another section; else a similar name, from the same
    section if possible. A field of a list's entries is written in the list's form, unless `name` itself is inside such
    an entry (`in_entry`)."""
    section, _, last = _INDEX.sub("", name.replace("-", "_")).rpartition(".")
    known = names_of(kind)
    entry = list(fields_of(items_of(known.get(section))))
    if entry:
        holder = name.rpartition(".")[0]
        return [f"{holder}.{each}" if in_entry else f"{section}: [{{{each}: …}}]" for each in _alike(last, entry)]
    same = [each for each in known if each.rpartition(".")[2] == last]
    same += [f"{each}: [{{{field}: …}}]" for each, field in entry_fields_of(kind) if field == last]
    if same:
        return same[:_AT_MOST]
    if section:
        sections = [each for each in known if fields_of(known[each])]
        for each in [section] if section in known else _alike(section, sections):
            if alike := _alike(last, list(fields_of(known[each]))):
                return [f"{each}.{alike[0]}"]
    by_last = {each.rpartition(".")[2]: each for each in reversed(known)}
    return [by_last[each] for each in _alike(last, list(by_last))]


def _alike(word: str, words: list[str]) -> list[str]:
    return difflib.get_close_matches(word, words, n=1)


def to_plain(value: object) -> object:
    """Return a config as plain dicts, lists, strings and numbers, in the order of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def built(kind: Any, given: Any) -> Any:
    """Build the dataclass from plain data. No required field may be missing."""
    if fields_of(kind):
        sections = {name: {} for name, of_field in fields_of(kind).items() if fields_of(of_field)}
        return kind(**{name: built(fields_of(kind)[name], item) for name, item in {**sections, **given}.items()})
    if isinstance(given, list):
        return tuple(built(items_of(kind), item) for item in given)
    return given


def missing(kind: Any, given: dict, section: str = "") -> Iterator[str]:
    """Yield the dotted names of required fields that were not given."""
    required = required_of(kind)
    for name, of_field in fields_of(kind).items():
        if fields_of(of_field):
            yield from missing(of_field, given.get(name, {}), f"{section}{name}.")
        elif name in required and name not in given:
            yield f"{section}{name}"


def with_defaults(kind: Any, given: Any) -> Any:
    """Return all fields, in their order. A required field that was not given is null."""
    if isinstance(given, list):
        return [with_defaults(items_of(kind), item) for item in given]
    if not fields_of(kind):
        return given
    whole = {}
    for field in dataclasses.fields(kind):
        of_field = fields_of(kind)[field.name]
        if field.name in given or fields_of(of_field):
            whole[field.name] = with_defaults(of_field, given.get(field.name, {}))
        elif field.default_factory is not dataclasses.MISSING:
            whole[field.name] = to_plain(field.default_factory())
        else:
            whole[field.name] = None if field.default is dataclasses.MISSING else to_plain(field.default)
    return whole


def with_homes(kind: Any, given: Any, name: str = "") -> Any:
    """Return `given` with `~` in its paths expanded.

    Raises:
        ConfigError: a path cannot be expanded, or cannot be what was meant.
    """
    if isinstance(given, str) and is_file_path(kind):
        try:
            return expand_user(given)
        except ValueError as error:
            raise ConfigError(f"{printable(name)} is {given!r}: {error}") from None
    if isinstance(given, list):
        return [with_homes(items_of(kind), item, f"{name}[{index}]") for index, item in enumerate(given)]
    if isinstance(given, dict):
        kinds = fields_of(kind)
        dot = f"{name}." if name else ""
        return {key: with_homes(kinds.get(key) or items_of(kind), item, f"{dot}{key}") for key, item in given.items()}
    return given
