"""Plain data, as `reading` leaves it, -> dataclasses and back. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.fields import fields_of, is_file_path, items_of, required_of
from megatron_llamapro.config.paths import expand_user
from megatron_llamapro.config.values import printable


def to_plain(value: object) -> object:
    """A config as plain dicts, lists, strings and numbers, in the order of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def built(kind: Any, given: Any) -> Any:
    """The dataclass of what was given; nothing that is required is missing."""
    if fields_of(kind):
        sections = {name: {} for name, of_field in fields_of(kind).items() if fields_of(of_field)}
        return kind(**{name: built(fields_of(kind)[name], item) for name, item in {**sections, **given}.items()})
    if isinstance(given, list):
        return tuple(built(items_of(kind), item) for item in given)
    return given


def missing(kind: Any, given: dict, section: str = "") -> Iterator[str]:
    """Dotted names of required fields that were not given."""
    required = required_of(kind)
    for name, of_field in fields_of(kind).items():
        if fields_of(of_field):
            yield from missing(of_field, given.get(name, {}), f"{section}{name}.")
        elif name in required and name not in given:
            yield f"{section}{name}"


def with_defaults(kind: Any, given: Any) -> Any:
    """All fields, in their order; null where a required one was not given."""
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
    """What was given, with `~` in its paths replaced.

    Raises:
        ConfigError: a path cannot be meant as it stands.
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
