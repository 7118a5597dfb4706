"""Rotary embeddings as a Hugging Face `config.json` describes them, and their frequencies.

Only the frequencies need torch: the functions that compute them import it.

There are two spellings, and versions of transformers read them by different rules:

- 4.x reads `rope_theta` and `rope_scaling`, and ignores `rope_parameters`.
- 5.x reads `rope_scaling` if it is not empty, else `rope_parameters`. Its `rope_theta` wins, then the one at top level,
  then the family's default. An `original_max_position_embeddings` at top level wins over the one inside.

This module reads as 5.x does. It refuses a file that also says something else, because some version follows that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.fields import count, number
from megatron_llamapro.families.shape import ModelShape, RopeScaling

if TYPE_CHECKING:
    import torch

# Fields of each type, in the order of `RopeScaling`.
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_NEWER, _OLDER, _THETA = "rope_parameters", "rope_scaling", "rope_theta"
_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"


@dataclass(frozen=True)
class Rope:
    """The numbers that, with the size of a head, determine the frequencies of rotary embeddings."""

    base: float
    scaling: RopeScaling | None


def read_rope(config: Mapping, *, default_base: float) -> Rope:
    """Return the rotary embeddings of a model.

    Raises:
        CheckpointError: the type is not supported, a field is missing or of the wrong type, or two fields contradict
            each other.
    """
    objects = {name: found for name in (_OLDER, _NEWER) if (found := _object(config, name))}
    name, read = next(iter(objects.items()), (_NEWER, {}))
    theta = read if _THETA in read else {_THETA: config.get(_THETA, default_base)}
    if theta[_THETA] is None:
        raise CheckpointError(
            "config.json has rope_theta null, and transformers fails on that: remove it, or give a number"
        )
    rope = Rope(number(theta, _THETA), _scaling(config, name, read))
    for other, found in objects.items():
        if (scaling := _scaling(config, other, found)) != rope.scaling:
            raise CheckpointError(
                f"config.json has {_words(rope.scaling)} in {name} but {_words(scaling)} in {other}: {_REMEDY}"
            )
    for where, found in (("its top level", config), *objects.items()):
        if found.get(_THETA) is not None and number(found, _THETA) != rope.base:
            raise CheckpointError(
                f"config.json has rope_theta {found[_THETA]:g} in {where}, but transformers 5 reads {rope.base:g}: "
                f"{_REMEDY}"
            )
    return rope


def with_older_spelling(config: Mapping, *, default_base: float) -> dict:
    """Return `config`. If transformers 4.x would read other rotary embeddings from it, add 4.x's spelling of them."""
    rope = read_rope(config, default_base=default_base)
    if _read_by_version_4(config, default_base) == rope:
        return {**config}
    fields = {key: value for key, value in asdict(rope.scaling).items() if value is not None} if rope.scaling else None
    return {**config, _THETA: rope.base, _OLDER: fields}


_REMEDY = "versions of transformers disagree about that; keep the right one and remove the other"


def _read_by_version_4(config: Mapping, default_base: float) -> Rope | None:
    """Return the rotary embeddings that transformers 4.x reads, or None if it fails."""
    base, older = config.get(_THETA, default_base), config.get(_OLDER)
    if base is None or (older is not None and not older.keys() & {"type", "rope_type"}):
        return None
    try:
        return Rope(number({_THETA: base}, _THETA), _scaling({}, _OLDER, older or {}))
    except CheckpointError:
        return None


def _object(config: Mapping, name: str) -> dict:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has {name} {value!r}: it must be an object")
    for key, inner in value.items():
        if isinstance(inner, dict):
            raise CheckpointError(
                f"config.json: {name} has separate fields for {key!r}: rotary embeddings that differ by layer are not "
                "supported"
            )
    if value.get(_PARTIAL, 1) != 1:
        raise CheckpointError(f"config.json: {name} has {_PARTIAL} {value[_PARTIAL]!r}: only 1 is supported")
    return value


def _scaling(config: Mapping, name: str, rope: Mapping) -> RopeScaling | None:
    """Return how one of the two objects stretches the frequencies, or None if it does not."""
    rope_type = _type(name, rope)
    if rope_type == "default":
        return None
    outside = {_ORIGINAL: config[_ORIGINAL]} if _ORIGINAL in config and rope_type == "llama3" else {}
    if outside and rope.get(_ORIGINAL, outside[_ORIGINAL]) != outside[_ORIGINAL]:
        raise CheckpointError(
            f"config.json has {_ORIGINAL} {outside[_ORIGINAL]!r} at top level, {rope[_ORIGINAL]!r} in {name}: {_REMEDY}"
        )
    rope = {**rope, **outside}
    missing = [field for field in _FIELDS[rope_type] if rope.get(field) is None]
    if missing:
        raise CheckpointError(f"config.json: rotary embeddings of type {rope_type} need {', '.join(missing)}")
    values: dict = {field: number(rope, field) for field in _FIELDS[rope_type]}
    if rope_type == "llama3":
        values[_ORIGINAL] = count(rope, _ORIGINAL, 10**10)
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise CheckpointError(
                "config.json: low_freq_factor of the rotary embeddings must be below high_freq_factor"
            )
    return RopeScaling(rope_type=rope_type, **values)


def _type(name: str, rope: Mapping) -> str:
    stated = [rope[key] for key in ("rope_type", "type") if key in rope]
    rope_type = stated[0] if stated else "default"
    if not isinstance(rope_type, str) or rope_type not in _FIELDS:
        raise CheckpointError(
            f"config.json has rotary embeddings of type {rope_type!r}: the supported types are {', '.join(_FIELDS)}"
        )
    if stated[1:] not in ([], [rope_type]):
        raise CheckpointError(f"config.json: {name} has rope_type {rope_type!r} and type {stated[1]!r}: {_REMEDY}")
    return rope_type


def _words(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return "unscaled rotary embeddings"
    fields = (f"{name} {value:g}" for name, value in asdict(scaling).items() if isinstance(value, (int, float)))
    return f"rotary embeddings of type {scaling.rope_type} with {', '.join(fields)}"


def inverse_frequencies(shape: ModelShape) -> torch.Tensor:
    """Return the frequency of every pair of head dimensions, float32, [kv_channels / 2], in radians per token.

    They equal transformers' bit for bit. megatron.core 0.16.1 scales only with Llama 3.1's constants, but a checkpoint
    may have its own.
    """
    import torch

    exponent = torch.arange(0, shape.kv_channels, 2, dtype=torch.int64).to(torch.float32) / shape.kv_channels
    frequencies = 1.0 / (shape.rotary_base**exponent)
    if shape.rope_scaling is None:
        return frequencies
    return _SCALE[shape.rope_scaling.rope_type](frequencies, shape.rope_scaling)


def _scale_linear(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide positions by `factor`."""
    return frequencies / scaling.factor


def _scale_llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide frequencies of long wavelengths by `factor`, keep short ones, interpolate in between (Llama 3.1)."""
    import torch

    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(is_between, between, scaled)


_SCALE = {"linear": _scale_linear, "llama3": _scale_llama3}
