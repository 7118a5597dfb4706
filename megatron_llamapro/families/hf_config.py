"""Model families: a table that turns a Hugging Face `config.json` into a model's shape.

A family is an entry of `FAMILIES`. It says what its blocks have, which fields hold one value per layer, and when a
copied block with zeroed output projections is an identity. Imports no torch. See docs/families.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import hint_inside, hint_where_nothing_is, read_inside
from megatron_llamapro.families.fields import count, flag, number
from megatron_llamapro.families.refusals import reason_for
from megatron_llamapro.families.rotary import read_rope, with_older_spelling
from megatron_llamapro.families.shape import ModelShape

CONFIG_NAME = "config.json"
MANIFEST_KEY = "llamapro"

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Types in which weights may be stored, by their name in config.json and in the commands → bytes per weight."""

WEIGHT_DTYPES = tuple(ITEMSIZES)


@dataclass(frozen=True)
class Requirement:
    """A field that must be absent or have `value`."""

    field: str
    value: object
    reason: str


class Windows(Enum):
    """Which layers attend to the last `sliding_window` tokens only."""

    NONE = "none"
    EVERY_LAYER = "every layer"
    """If `sliding_window` is a number."""
    BY_LAYER_TYPE = "by layer type"
    """If `use_sliding_window` is true: the layers that `layer_types` calls sliding_attention. Without that list, the
    layers from `max_window_layers` on."""


@dataclass(frozen=True)
class Family:
    """The properties that all models of one `model_type` share."""

    model_type: str
    requirements: tuple[Requirement, ...] = ()
    """In addition to the requirements of every family."""
    add_qkv_bias: bool = False
    bias_fields: tuple[str, ...] = ()
    """Flags that give all linears of a block biases if all of them are true. If only some are true, the model is
    refused."""
    qk_layernorm: bool = False
    has_experts: bool = False
    windows: Windows = Windows.NONE
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    """Lists with one entry per layer. Added blocks get their parent's entry."""
    layer_count_fields: tuple[str, ...] = ()
    """Counts of layers from the first on. They grow with the blocks added among those layers."""
    rotary_base: float = 10000.0
    """If config.json gives none."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """transformers' defaults for absent fields, if they differ from the defaults of the readers below."""
    not_null: tuple[str, ...] = ()
    """Fields that may be absent but not null: transformers fails on null."""
    hidden_size_divides: bool = False
    """Whether transformers requires the heads to divide `hidden_size` even if `head_dim` is given."""


_SOME_BIASES = (
    "megatron.core's models have biases in all linears of a block, or only in queries, keys and values (zeros in "
    "place of missing biases would train, and could not be exported)"
)
_EVERY_FAMILY = (
    Requirement("hidden_act", "silu", "only SwiGLU blocks (hidden_act silu) are supported"),
    Requirement("attention_dropout", 0.0, "an identity block must always compute the same result"),
    Requirement("is_causal", True, "transformers 5 would let a token attend to later ones"),
    Requirement("partial_rotary_factor", 1.0, "llamapro's model rotates whole heads"),
    Requirement("per_layer_config", None, "layers of different sizes are not supported"),
    Requirement("configuration_files", None, "transformers may read one of these files instead of config.json"),
)
_NO_LAYER_TYPES = Requirement(
    "layer_types",
    None,
    "versions of transformers disagree about it in this family (4.57 and later read a mistral that has it as a "
    "ministral, 4.56 ignores it)",
)
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            requirements=(_NO_LAYER_TYPES,),
            bias_fields=("attention_bias", "mlp_bias"),
            hidden_size_divides=True,
        ),
        Family(
            "mistral",
            requirements=(_NO_LAYER_TYPES,),
            windows=Windows.EVERY_LAYER,
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            not_null=("num_key_value_heads", "layer_types"),
        ),
        Family(
            "qwen2",
            add_qkv_bias=True,
            windows=Windows.BY_LAYER_TYPE,
            layer_count_fields=("max_window_layers",),
            defaults=_QWEN_DEFAULTS,
            not_null=("head_dim",),
        ),
        Family(
            "qwen3",
            requirements=(Requirement("attention_bias", False, _SOME_BIASES),),
            qk_layernorm=True,
            windows=Windows.BY_LAYER_TYPE,
            layer_count_fields=("max_window_layers",),
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
            not_null=("head_dim",),
        ),
        Family(
            "mixtral",
            requirements=(
                _NO_LAYER_TYPES,
                Requirement("router_jitter_noise", 0.0, "an identity block must always compute the same result"),
            ),
            has_experts=True,
            windows=Windows.EVERY_LAYER,
            rotary_base=1e6,
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            not_null=("num_key_value_heads",),
        ),
    )
}

# Whole numbers in config.json: our name, their name, the largest accepted value.
_MOST_EXPERTS = 100_000  # in all layers together: their tensors' names are built before any file is read

_COUNTS = (
    ("num_layers", "num_hidden_layers", 10_000),
    ("hidden_size", "hidden_size", 1_000_000),
    ("ffn_hidden_size", "intermediate_size", 10_000_000),
    ("num_attention_heads", "num_attention_heads", 100_000),
    ("vocab_size", "vocab_size", 100_000_000),
    ("max_position_embeddings", "max_position_embeddings", 10**10),
)

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class HfModel:
    """A model as described by the `config.json` of its folder."""

    config: dict
    """Includes the manifest, if there is one."""
    shape: ModelShape


def read_hf_model(folder: str | Path) -> HfModel:
    """Return the model that `config.json` of a checkpoint folder describes.

    Raises:
        CheckpointError: as `read_hf_config` and `model_shape`. The message names the folder.
    """
    config = read_hf_config(Path(folder))
    try:
        return HfModel(config, model_shape(config))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def read_hf_config(folder: Path) -> dict:
    """Return `config.json` of a checkpoint folder, including its manifest if it has one.

    Raises:
        CheckpointError: the folder or the file does not exist, or the file is not a JSON object.
    """
    path, content = Path(folder) / CONFIG_NAME, read_inside(folder, CONFIG_NAME)
    if content is None:
        if not Path(folder).is_dir():
            hint = hint_where_nothing_is(folder) or "give the folder of a checkpoint"
            raise CheckpointError(f"{folder} is not a folder: {hint}")
        hint = hint_inside(folder, CONFIG_NAME) or (
            "give the folder of a checkpoint; if it is Megatron-LM's, first copy the model's config.json into it"
        )
        raise CheckpointError(f"{folder} has no config.json: {hint}")
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object, so it is not a model's configuration")
    return config


def family_of(config: Mapping) -> Family:
    """Return the family of a model, and check its requirements.

    Raises:
        CheckpointError: the `model_type` is unknown, or the model's added blocks could not be identities.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        reason = reason_for(config)
        raise CheckpointError(
            f"model_type {model_type!r} is not supported: {f'{reason}; ' if reason else ''}"
            f"the supported types are {', '.join(sorted(FAMILIES))}"
        )
    for requirement in (*_EVERY_FAMILY, *family.requirements):
        value = config.get(requirement.field, requirement.value)
        if value != requirement.value:
            raise CheckpointError(
                f"config.json has {requirement.field} {value!r}, but only {requirement.value!r} is supported: "
                f"{requirement.reason}"
            )
    for name in family.not_null:
        if name in config and config[name] is None:
            raise CheckpointError(
                f"config.json has {name} null, and transformers fails on that: remove it, or give a value"
            )
    return family


def model_shape(config: Mapping) -> ModelShape:
    """Return the shape that a Hugging Face configuration describes.

    Raises:
        CheckpointError: the family or the rotary embedding is not supported; a field is missing, of the wrong type or
            too large; the heads do not divide.
    """
    family = family_of(config)
    config = {**family.defaults, **config}
    all_biases = _has_all_biases(config, family)
    counts = {ours: count(config, theirs, largest) for ours, theirs, largest in _COUNTS}
    rope = read_rope(config, default_base=family.rotary_base)
    return ModelShape(
        **counts,
        **_heads(config, family, heads=counts["num_attention_heads"], hidden_size=counts["hidden_size"]),
        **_experts(config, family),
        **_windows(config, family, num_layers=counts["num_layers"]),
        layernorm_epsilon=number(config, "rms_norm_eps", default=1e-6, kinds=(float,)),
        rotary_base=rope.base,
        rope_scaling=rope.scaling,
        tie_word_embeddings=flag(config, "tie_word_embeddings", default=False),
        add_qkv_bias=family.add_qkv_bias or all_biases,
        add_bias_linear=all_biases,
        qk_layernorm=family.qk_layernorm,
    )


def _has_all_biases(config: Mapping, family: Family) -> bool:
    flags = {name: flag(config, name, default=False) for name in family.bias_fields}
    if len(set(flags.values())) > 1:
        found = " and ".join(f"{name} {value}" for name, value in flags.items())
        raise CheckpointError(f"config.json has {found}, but only both or neither are supported: {_SOME_BIASES}")
    return any(flags.values())


def _heads(config: Mapping, family: Family, *, heads: int, hidden_size: int) -> dict[str, int]:
    groups = count(config, "num_key_value_heads", heads, default=heads)
    if heads % groups:
        raise CheckpointError(f"config.json has {heads} attention heads, not a multiple of {groups} key-value heads")
    if hidden_size % heads and (config.get("head_dim") is None or family.hidden_size_divides):
        raise CheckpointError(f"config.json has hidden_size {hidden_size}, not a multiple of {heads} heads")
    channels = count(config, "head_dim", 100_000, default=hidden_size // heads)
    if channels % 2:
        raise CheckpointError(f"config.json has head_dim {channels}: rotary embeddings turn pairs, so it must be even")
    return {"num_query_groups": groups, "kv_channels": channels}


def _experts(config: Mapping, family: Family) -> dict[str, int]:
    if not family.has_experts:
        return {}
    experts = count(config, "num_local_experts", 10_000)
    chosen = count(config, "num_experts_per_tok", experts)
    if chosen == 1:
        raise CheckpointError(
            "config.json has num_experts_per_tok 1: transformers weights a single expert by 1 whatever its logit, and "
            "megatron.core's router cannot do that"
        )
    if config.get("num_experts", experts) != experts:
        raise CheckpointError(
            f"config.json has num_local_experts {experts}, num_experts {config['num_experts']!r}: transformers 4 reads "
            "the first, 5 the second; keep the right one and remove the other"
        )
    if experts * config["num_hidden_layers"] > _MOST_EXPERTS:
        raise CheckpointError(
            f"config.json has {experts} experts in {config['num_hidden_layers']} layers: that is too many"
        )
    return {"num_moe_experts": experts, "moe_router_topk": chosen}


def _windows(config: Mapping, family: Family, *, num_layers: int) -> dict:
    windowed = [kind == _SLIDING for kind in layer_types(config, family, num_layers)]
    if not any(windowed):
        return {}
    size = count(config, "sliding_window", 10**10)  # includes the token itself; megatron.core's size does not
    return {
        "window_size": (size - 1, 0),
        "window_attn_skip_freq": None if all(windowed) else tuple(int(has_window) for has_window in windowed),
    }


def layer_types(config: Mapping, family: Family, num_layers: int) -> list[str]:
    """Return every layer's type of attention, as transformers reads the configuration."""
    has_window = config.get("sliding_window") is not None
    if family.windows is Windows.EVERY_LAYER:
        return [_SLIDING if has_window else _FULL] * num_layers
    if family.windows is Windows.NONE:
        return [_FULL] * num_layers
    has_window = flag(config, "use_sliding_window", default=False) and has_window
    types = config.get("layer_types")
    if types is None:
        first = config["max_window_layers"]
        if type(first) is not int or first < 0:
            raise CheckpointError(f"config.json has max_window_layers {first!r}: it must be a whole number, 0 or more")
        return [_SLIDING if has_window and layer >= first else _FULL for layer in range(num_layers)]
    check_per_layer("layer_types", types, num_layers)
    for kind in types:
        if kind not in (_SLIDING, _FULL):
            raise CheckpointError(f"config.json: layer_types has {kind!r}: the supported types are {_FULL}, {_SLIDING}")
    if _SLIDING in types and not has_window:
        raise CheckpointError(
            f"config.json: layer_types has {_SLIDING}, but use_sliding_window and sliding_window give no window"
        )
    return types


def check_per_layer(field_name: str, values: object, num_layers: int) -> None:
    if not isinstance(values, list) or len(values) != num_layers:
        raise CheckpointError(f"config.json: {field_name} must be a list of {num_layers} values, one per layer")


def spelled_for_all(config: Mapping) -> dict:
    """Return `config` with the fields that only transformers 5 would read also in the spelling that 4 reads."""
    return with_older_spelling(config, default_base=family_of(config).rotary_base)
