"""What a configuration consists of, from the types of its dataclasses: sections of fields, and lists of entries.
Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

_UNIONS = (Union, types.UnionType)

FilePath = Annotated[str, "path"]
"""Of a file or folder: `~` at its start is the home folder, wherever it comes from."""


def is_file_path(kind: Any) -> bool:
    """Whether a field is a `FilePath`, or may be one."""
    return kind == FilePath or any(map(is_file_path, get_args(kind) if get_origin(kind) in _UNIONS else ()))


@functools.cache
def fields_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by their names, with their annotations; of anything else, none."""
    return get_type_hints(kind, include_extras=True) if dataclasses.is_dataclass(kind) else {}


def required_of(kind: Any) -> list[str]:
    """Fields that have no default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing and not fields_of(fields_of(kind)[field.name])
    ]


def alternatives_of(kind: Any) -> tuple:
    """The members of a union, without their annotations; of any other type, itself."""
    if get_origin(kind) is Annotated:
        return alternatives_of(get_args(kind)[0])
    if get_origin(kind) in _UNIONS:
        return tuple(member for part in get_args(kind) for member in alternatives_of(part))
    return (kind,)


def is_optional(kind: Any) -> bool:
    """Whether it may be null."""
    return type(None) in alternatives_of(kind)


def items_of(kind: Any) -> Any:
    """The type of what a list holds, or of the values that names have; None of anything else."""
    for alternative in alternatives_of(kind):
        if get_origin(alternative) is tuple:
            return get_args(alternative)[0]
        if get_origin(alternative) is dict:
            return get_args(alternative)[1]
    return None


def names_of(kind: Any) -> dict[str, Any]:
    """Dotted names and types of all sections and fields, from the top."""
    found = {}
    for name, of_field in fields_of(kind).items():
        found[name] = of_field
        found |= {f"{name}.{inner}": of_inner for inner, of_inner in names_of(of_field).items()}
    return found


def entry_fields_of(kind: Any) -> Iterator[tuple[str, str]]:
    """Dotted names of the lists whose items have fields, each with every such field."""
    for name, of_field in names_of(kind).items():
        for inner in fields_of(items_of(of_field)):
            yield name, inner
