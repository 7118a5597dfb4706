"""Model families: what a Hugging Face `config.json` says about a model's shape, as tables.

A family is an entry of `FAMILIES`: the fields that must have a certain value for a copy of a block to be made an
identity by zeroing its two output projections, and the fields that hold one value a layer. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import ExpansionPlan

CONFIG_NAME = "config.json"
MANIFEST_KEY = "llamapro"

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Types that weights may be stored in, by the name that config.json and the commands use, and their bytes."""

WEIGHT_DTYPES = tuple(ITEMSIZES)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts."""

    rope_type: str
    """linear or llama3."""
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """Everything about a model that decides its computation and its tensors' shapes, in megatron.core's spelling."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Requirement:
    """A field that must have `value` (or be absent)."""

    field: str
    value: object
    reason: str


@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` share."""

    model_type: str
    requirements: tuple[Requirement, ...]
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    """Lists with one entry a layer, extended with the plan."""


_NO_BIAS = "a bias would have to be zeroed too, and this family's weight map has no row for it"
_SWIGLU = "only SwiGLU blocks (hidden_act silu) are known"

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        requirements=(
            Requirement("hidden_act", "silu", _SWIGLU),
            Requirement("attention_bias", False, _NO_BIAS),
            Requirement("mlp_bias", False, _NO_BIAS),
            Requirement("attention_dropout", 0.0, "an identity block must compute the same every time"),
        ),
    ),
}

# Whole numbers of config.json: our name, theirs, the largest that is believed.
_COUNTS = (
    ("num_layers", "num_hidden_layers", 10_000),
    ("hidden_size", "hidden_size", 1_000_000),
    ("ffn_hidden_size", "intermediate_size", 10_000_000),
    ("num_attention_heads", "num_attention_heads", 100_000),
    ("vocab_size", "vocab_size", 100_000_000),
    ("max_position_embeddings", "max_position_embeddings", 10**10),
)

# Fields of a scaled RoPE that each type needs.
_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_hf_config(folder: Path) -> dict:
    """`config.json` of a checkpoint folder, with its manifest (if it has one) left in.

    Raises:
        CheckpointError: no folder, no file, or not a JSON object.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        what = "has no config.json" if Path(folder).is_dir() else "is not a folder"
        raise CheckpointError(f"{folder} {what}: give the folder of a checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: it is not a model's configuration")
    return config


def family_of(config: Mapping) -> Family:
    """The family of a model, with its requirements checked.

    Raises:
        CheckpointError: an unknown `model_type`, or a model whose added blocks could not be made identities.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(f"model_type {model_type!r} is not supported: known are {', '.join(sorted(FAMILIES))}")
    for requirement in family.requirements:
        value = config.get(requirement.field, requirement.value)
        if value != requirement.value:
            raise CheckpointError(
                f"config.json has {requirement.field} {value!r}, only {requirement.value!r} is supported: "
                f"{requirement.reason}"
            )
    return family


def model_shape(config: Mapping) -> ModelShape:
    """The shape that a Hugging Face configuration describes.

    Raises:
        CheckpointError: a family or a rotary embedding that is not supported; a field that is missing, of the wrong
            type or absurd; heads that do not divide.
    """
    family_of(config)
    counts = {ours: _count(config, theirs, largest) for ours, theirs, largest in _COUNTS}
    heads = counts["num_attention_heads"]
    groups = _count(config, "num_key_value_heads", heads, default=heads)
    if heads % groups:
        raise CheckpointError(f"config.json has {heads} attention heads, which {groups} key-value heads do not divide")
    default_channels = counts["hidden_size"] // heads
    if config.get("head_dim") is None and counts["hidden_size"] % heads:
        raise CheckpointError(f"config.json has hidden_size {counts['hidden_size']}, which {heads} heads do not divide")
    channels = _count(config, "head_dim", 100_000, default=default_channels)
    if channels % 2:
        raise CheckpointError(f"config.json has head_dim {channels}: rotary embeddings turn pairs, so it must be even")
    rope = _rope_parameters(config)
    return ModelShape(
        **counts,
        num_query_groups=groups,
        kv_channels=channels,
        layernorm_epsilon=_number(config, "rms_norm_eps", default=1e-6),
        rotary_base=_number(rope, "rope_theta", default=10000.0),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=_flag(config, "tie_word_embeddings", default=False),
    )


def expanded_hf_config(config: Mapping, plan: ExpansionPlan) -> dict:
    """`config` for the model that `plan`'s latest round makes of it, without any manifest: the layer count and every
    field with one value a layer."""
    expanded = {key: value for key, value in config.items() if key != MANIFEST_KEY}
    old_count = config["num_hidden_layers"]
    expanded["num_hidden_layers"] = plan.num_layers
    for field in family_of(config).per_layer_fields:
        values = config.get(field)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != old_count:
            raise CheckpointError(f"config.json: {field} has no value for each of the {old_count} layers")
        expanded[field] = [values[layer.parent_layer] for layer in plan.layers]
    return expanded


def _count(config: Mapping, name: str, largest: int, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json has no {name}")
    if type(value) is not int or not 1 <= value <= largest:
        raise CheckpointError(f"config.json has {name} {value!r}: it must be a whole number from 1 to {largest}")
    return value


def _number(config: Mapping, name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json has {name} {value!r}: it must be a number above 0")
    return float(value)


def _flag(config: Mapping, name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {name} {value!r}: it must be true or false")
    return value


def _rope_parameters(config: Mapping) -> dict:
    """Rotary settings in one dict: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json has {name} {value!r}: it must be an object")
    return {"rope_theta": config.get("rope_theta"), **(older or {}), **(newer or {})}


def _rope_scaling(rope: Mapping) -> RopeScaling | None:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    fields = _ROPE_FIELDS.get(rope_type) if isinstance(rope_type, str) else None
    if fields is None:
        raise CheckpointError(
            f"config.json has rotary embeddings of type {rope_type!r}: known are default, {', '.join(_ROPE_FIELDS)}"
        )
    values: dict = {name: _number(rope, name) for name in fields if rope.get(name) is not None}
    missing = [name for name in fields if name not in values]
    if missing:
        raise CheckpointError(f"config.json: rotary embeddings of type {rope_type} need {', '.join(missing)}")
    if rope_type == "llama3":
        values["original_max_position_embeddings"] = _count(rope, "original_max_position_embeddings", 10**10)
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise CheckpointError(
                "config.json: low_freq_factor of the rotary embeddings must be below high_freq_factor"
            )
    return RopeScaling(rope_type=rope_type, **values)
