"""Reads fields of a Hugging Face `config.json` and checks their types. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from megatron_llamapro.config.errors import CheckpointError


def count(config: Mapping, name: str, largest: int, default: int | None = None) -> int:
    """Return the field `name`, a whole number from 1 to `largest`. Absent or null means `default`, if given."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json has no {name}")
    if type(value) is not int or not 1 <= value <= largest:
        raise CheckpointError(f"config.json has {name} {value!r}: it must be a whole number from 1 to {largest}")
    return value


def number(
    config: Mapping, name: str, default: float | None = None, *, kinds: tuple[type, ...] = (int, float)
) -> float:
    """Return the field `name`, a number above 0. Null is refused: transformers does not replace it with a default."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= sys.float_info.max:
        what = "a number" if int in kinds else "a number with a decimal point, such as 1.0,"
        raise CheckpointError(f"config.json has {name} {value!r}: it must be {what} above 0")
    return float(value)


def flag(config: Mapping, name: str, default: bool) -> bool:
    """Return the field `name`, true or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {name} {value!r}: it must be true or false")
    return value
