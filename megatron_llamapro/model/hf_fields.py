"""Fields of a Hugging Face `config.json`, read with their types checked. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.shape import RopeScaling

# Fields of a scaled RoPE that each type needs.
_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def count(config: Mapping, name: str, largest: int, default: int | None = None) -> int:
    """A whole number from 1 to `largest`."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json has no {name}")
    if type(value) is not int or not 1 <= value <= largest:
        raise CheckpointError(f"config.json has {name} {value!r}: it must be a whole number from 1 to {largest}")
    return value


def number(config: Mapping, name: str, default: float | None = None) -> float:
    """A number above 0."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json has {name} {value!r}: it must be a number above 0")
    return float(value)


def flag(config: Mapping, name: str, default: bool) -> bool:
    """True or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {name} {value!r}: it must be true or false")
    return value


def rope_parameters(config: Mapping) -> dict:
    """Rotary settings in one dict: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json has {name} {value!r}: it must be an object")
    return {"rope_theta": config.get("rope_theta"), **(older or {}), **(newer or {})}


def rope_scaling(rope: Mapping) -> RopeScaling | None:
    """What `rope_parameters` says of stretched frequencies; None where they are not."""
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    fields = _ROPE_FIELDS.get(rope_type) if isinstance(rope_type, str) else None
    if fields is None:
        raise CheckpointError(
            f"config.json has rotary embeddings of type {rope_type!r}: known are default, {', '.join(_ROPE_FIELDS)}"
        )
    values: dict = {name: number(rope, name) for name in fields if rope.get(name) is not None}
    missing = [name for name in fields if name not in values]
    if missing:
        raise CheckpointError(f"config.json: rotary embeddings of type {rope_type} need {', '.join(missing)}")
    if rope_type == "llama3":
        values["original_max_position_embeddings"] = count(rope, "original_max_position_embeddings", 10**10)
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise CheckpointError(
                "config.json: low_freq_factor of the rotary embeddings must be below high_freq_factor"
            )
    return RopeScaling(rope_type=rope_type, **values)
