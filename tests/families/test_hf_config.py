"""The shape that config.json describes, and the configurations that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.round import expanded_hf_config
from megatron_llamapro.families.hf_config import FAMILIES, model_shape, read_hf_config
from megatron_llamapro.families.shape import RopeScaling, padded_vocab_size

LLAMA_2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA_3 = {**LLAMA_2, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256, "head_dim": 128}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_llama_2_is_read() -> None:
    shape = model_shape(LLAMA_2)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (32, 4096, 11008)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (32, 32, 128)
    assert (shape.vocab_size, shape.max_position_embeddings, shape.layernorm_epsilon) == (32000, 4096, 1e-5)
    assert (shape.rotary_base, shape.rope_scaling, shape.tie_word_embeddings) == (10000.0, None, False)


def test_llama_1_has_no_groups_and_no_rope_fields() -> None:
    older = {key: value for key, value in LLAMA_2.items() if key not in ("num_key_value_heads", "rope_scaling")}
    assert model_shape(older) == model_shape(LLAMA_2)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": SCALING},
        {"rope_parameters": {"rope_theta": 500000.0, **SCALING}},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 500000, **SCALING}},
    ],
    ids=["transformers 4", "transformers 5", "both, one empty"],
)
def test_llama_3_1_rotary_embeddings_are_read(rope: dict) -> None:
    shape = model_shape({**LLAMA_3, **rope})
    assert shape.rotary_base == 500000.0
    assert shape.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_the_older_name_of_linear_scaling_is_read() -> None:
    shape = model_shape({**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 4}})
    assert shape.rope_scaling == RopeScaling("linear", 4.0)


MISTRAL_7B = {**LLAMA_2, "model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096}
QWEN2_5_7B = {
    **LLAMA_2,
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_attention_heads": 28,
    "hidden_size": 3584,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "use_sliding_window": False,
}
QWEN3_4B = {
    **QWEN2_5_7B,
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "hidden_size": 2560,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": None,
    "max_window_layers": 36,
}
MIXTRAL_8X7B = {
    **MISTRAL_7B,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "sliding_window": None,
}


def features(config: dict) -> dict:
    """Return the features of a family's shape beyond LLaMA's."""
    plain = model_shape(LLAMA_2)
    names = (field.name for field in dataclasses.fields(plain) if field.default is not dataclasses.MISSING)
    values = {name: getattr(model_shape(config), name) for name in names}
    return {name: value for name, value in values.items() if value}


WINDOWED = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA_3, {}),
        ({**LLAMA_3, "sliding_window": 4096}, {}),
        ({**LLAMA_3, "attention_bias": False, "mlp_bias": False}, {}),
        ({**LLAMA_3, "attention_bias": True, "mlp_bias": True}, {"add_qkv_bias": True, "add_bias_linear": True}),
        (MISTRAL_7B, {"window_size": (4095, 0)}),
        ({**MISTRAL_7B, "sliding_window": None}, {}),
        (QWEN2_5_7B, {"add_qkv_bias": True}),
        ({**QWEN2_5_7B, **WINDOWED}, {"add_qkv_bias": True}),
        (
            {**QWEN2_5_7B, **WINDOWED, "max_window_layers": 0},
            {"add_qkv_bias": True, "window_size": (4095, 0)},
        ),
        (
            {**QWEN2_5_7B, **WINDOWED, "max_window_layers": 21},
            {"add_qkv_bias": True, "window_size": (4095, 0), "window_attn_skip_freq": (0,) * 21 + (1,) * 7},
        ),
        (QWEN3_4B, {"qk_layernorm": True}),
        (
            {**QWEN3_4B, **WINDOWED, "layer_types": ["full_attention", "sliding_attention"] * 18},
            {"qk_layernorm": True, "window_size": (4095, 0), "window_attn_skip_freq": (0, 1) * 18},
        ),
        (MIXTRAL_8X7B, {"num_moe_experts": 8, "moe_router_topk": 2}),
        (
            {**MIXTRAL_8X7B, "sliding_window": 4096},
            {"num_moe_experts": 8, "moe_router_topk": 2, "window_size": (4095, 0)},
        ),
    ],
)
def test_family_features_are_read(config: dict, expected: dict) -> None:
    assert features(config) == expected


def test_a_missing_field_has_transformers_default() -> None:
    """Old configurations omit default values; the default is the family's."""
    defaults = ("model_type", "num_key_value_heads", "rms_norm_eps")
    bare = {key: value for key, value in LLAMA_2.items() if key not in defaults}
    for model_type in FAMILIES:
        ours = model_shape({**bare, "model_type": model_type})
        theirs = AutoConfig.for_model(model_type, **bare)
        assert ours.num_query_groups == theirs.num_key_value_heads
        assert ours.layernorm_epsilon == theirs.rms_norm_eps
        assert ours.kv_channels == (getattr(theirs, "head_dim", None) or 128)
        assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
        assert ours.num_moe_experts == getattr(theirs, "num_local_experts", None)
        assert ours.moe_router_topk == getattr(theirs, "num_experts_per_tok", None)
        window = getattr(theirs, "sliding_window", None)
        assert ours.window_size == (None if window is None else (window - 1, 0))


def test_a_shape_knows_its_windows_and_layers() -> None:
    shape = model_shape({**QWEN2_5_7B, **WINDOWED, "num_hidden_layers": 4, "max_window_layers": 2})
    assert [shape.window_of(layer) for layer in range(4)] == [None, None, 4096, 4096]
    picked = shape.with_layers((0, 2, 2))
    assert (picked.num_layers, picked.window_attn_skip_freq) == (3, (0, 1, 1))
    assert model_shape(MISTRAL_7B).window_of(31) == 4096 and model_shape(LLAMA_2).window_of(0) is None


def test_head_dim_may_differ_from_the_quotient() -> None:
    assert model_shape({**LLAMA_3, "head_dim": 64}).kv_channels == 64
    assert model_shape({**LLAMA_3, "head_dim": None}).kv_channels == 128


def without(field: str) -> dict:
    return {key: value for key, value in LLAMA_2.items() if key != field}


REFUSED = {
    "an unknown family": (
        {**LLAMA_2, "model_type": "abc"},
        "model_type 'abc' is not supported: the supported types are llama, mistral, mixtral, qwen2, qwen3",
    ),
    "a family whose biases would remain": (
        {**LLAMA_2, "model_type": "gpt_neox"},
        "model_type 'gpt_neox' is not supported: its output projections or norms have biases.*; "
        "the supported types are llama",
    ),
    "a family with a norm behind": ({**LLAMA_2, "model_type": "olmo2"}, "a norm follows each output projection"),
    "biases in attention that norms of queries and keys replaced": (
        {**QWEN3_4B, "attention_bias": True},
        "attention_bias True.*bias",
    ),
    "random noise before the router": ({**MIXTRAL_8X7B, "router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
    "one expert a token": ({**MIXTRAL_8X7B, "num_experts_per_tok": 1}, "num_experts_per_tok 1: transformers weights"),
    "more experts a token than there are": ({**MIXTRAL_8X7B, "num_experts_per_tok": 9}, "num_experts_per_tok 9"),
    "a window of nothing": ({**MISTRAL_7B, "sliding_window": 0}, "sliding_window 0"),
    "windows of layers that are not known": (
        {**QWEN3_4B, "layer_types": ["linear_attention"] * 36},
        "layer_types has 'linear_attention': the supported types are full_attention, sliding_attention",
    ),
    "windows of too few layers": (
        {**QWEN3_4B, "layer_types": ["full_attention"]},
        "layer_types must be a list of 36 values, one per layer",
    ),
    "windows without a width": (
        {**QWEN3_4B, "layer_types": ["sliding_attention"] * 36},
        "use_sliding_window and sliding_window give no window",
    ),
    "a first windowed layer that is no number": (
        {**QWEN2_5_7B, **WINDOWED, "max_window_layers": "all"},
        "max_window_layers 'all'",
    ),
    "no family": (without("model_type"), "model_type"),
    "a family that is no text": ({**LLAMA_2, "model_type": ["llama"]}, "model_type"),
    "biases in attention alone": (
        {**LLAMA_2, "attention_bias": True},
        "attention_bias True and mlp_bias False, but only both or neither.*in all linears of a block",
    ),
    "biases in the feed-forward alone": (
        {**LLAMA_2, "attention_bias": False, "mlp_bias": True},
        "attention_bias False and mlp_bias True, but only both or neither.*megatron.core's models",
    ),
    "biases that are no flag": ({**LLAMA_2, "mlp_bias": "all"}, "mlp_bias 'all': it must be true or false"),
    "another activation": ({**LLAMA_2, "hidden_act": "gelu"}, "hidden_act 'gelu'.*SwiGLU"),
    "rotary embeddings that are not known": (
        {**LLAMA_2, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "'yarn': the supported types are default, linear, llama3",
    ),
    "scaling that lacks a field": (
        {**LLAMA_2, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "llama3 need low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "scaling that is no object": (
        {**LLAMA_2, "rope_scaling": "linear"},
        "rope_scaling 'linear': it must be an object",
    ),
    "scaling between factors that are equal": (
        {**LLAMA_2, "rope_scaling": {**SCALING, "high_freq_factor": 1.0}},
        "low_freq_factor of the rotary embeddings must be below",
    ),
    "scaling from a fraction of a position": (
        {**LLAMA_2, "rope_scaling": {**SCALING, "original_max_position_embeddings": 0.5}},
        "original_max_position_embeddings 0.5",
    ),
    "a number too large for any type": ({**LLAMA_2, "rope_theta": 10**400}, "rope_theta 1000"),
    "groups that do not divide": (
        {**LLAMA_2, "num_key_value_heads": 5},
        "32 attention heads.* 5 key-value heads",
    ),
    "more groups than heads": ({**LLAMA_2, "num_key_value_heads": 64}, "num_key_value_heads 64"),
    "heads that do not divide": (
        {**LLAMA_2, "num_attention_heads": 30, "num_key_value_heads": 30},
        "hidden_size 4096",
    ),
    "a missing field": (without("intermediate_size"), "no intermediate_size"),
    "a field of the wrong type": ({**LLAMA_2, "hidden_size": "4096"}, "hidden_size '4096'"),
    "a fraction": ({**LLAMA_2, "num_hidden_layers": 2.5}, "num_hidden_layers 2.5"),
    "true for a number": ({**LLAMA_2, "num_hidden_layers": True}, "num_hidden_layers True"),
    "no layers": ({**LLAMA_2, "num_hidden_layers": 0}, "num_hidden_layers 0"),
    "an absurd number": ({**LLAMA_2, "hidden_size": 10**15}, "hidden_size 1000000000000000"),
    "an odd head_dim": ({**LLAMA_2, "head_dim": 63}, "head_dim 63"),
    "a negative epsilon": ({**LLAMA_2, "rms_norm_eps": -1e-5}, "rms_norm_eps -1e-05"),
    "a NaN": ({**LLAMA_2, "rope_theta": float("nan")}, "rope_theta nan"),
    "text for true": ({**LLAMA_2, "tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line_with_the_reason(config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        model_shape(config)
    assert "\n" not in str(refusal.value)


def test_an_expanded_config_extends_every_per_layer_field() -> None:
    kinds = {"a": "full_attention", "b": "sliding_attention"}
    model = {**QWEN3_4B, **WINDOWED}
    config = {
        **model,
        "num_hidden_layers": 4,
        "layer_types": [kinds[k] for k in "abab"],
        "llamapro": {"old": "manifest"},
    }
    plan = ExpansionPlan.unexpanded(4).expand((2, 5))
    expected = {**model, "num_hidden_layers": 6, "max_window_layers": 38, "layer_types": [kinds[k] for k in "abbabb"]}
    assert expanded_hf_config(config, plan) == expected
    assert config["num_hidden_layers"] == 4


def test_a_per_layer_field_of_the_wrong_length_is_refused() -> None:
    config = {**QWEN3_4B, "num_hidden_layers": 4, "layer_types": ["full_attention"]}
    with pytest.raises(CheckpointError, match="layer_types must be a list of 4 values, one per layer"):
        expanded_hf_config(config, ExpansionPlan.unexpanded(4).expand((4,)))


@pytest.mark.parametrize("positions", [(2, 5), (2, 3), (4, 5)])
def test_windows_from_a_layer_on_move_with_the_plan(positions: tuple[int, int]) -> None:
    """They are also written layer by layer, because a group of copies may mix full and windowed layers."""
    config = {**QWEN2_5_7B, **WINDOWED, "num_hidden_layers": 4, "max_window_layers": 2}
    plan = ExpansionPlan.unexpanded(4).expand(positions)
    expanded = expanded_hf_config(config, plan)
    kinds = [model_shape(config).window_of(layer.parent_layer) for layer in plan.layers]
    assert [model_shape(expanded).window_of(layer) for layer in range(6)] == kinds
    assert expanded["max_window_layers"] == kinds.count(None)
    assert [kind[0] for kind in expanded["layer_types"]] == ["f" if kind is None else "s" for kind in kinds]


def test_windows_that_no_layer_uses_are_not_written() -> None:
    """The field keeps its meaning, all layers. No list appears that the source did not have."""
    plan = ExpansionPlan.unexpanded(28).expand((4, 9))
    expanded = expanded_hf_config(QWEN2_5_7B, plan)
    assert expanded == {**QWEN2_5_7B, "num_hidden_layers": 30, "max_window_layers": 30}


BROKEN_FILES = {
    "no file": (None, "has no config.json"),
    "not JSON": ("{", "is not JSON"),
    "not an object": ("[]", "is not a JSON object"),
    "not text": (b"\xff\xfe\x00", "is not JSON"),
    "a number of 5000 digits": ('{"hidden_size": ' + "9" * 5000 + "}", "is not JSON"),
    "nested too deeply": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_an_unreadable_config_file_is_refused(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        read_hf_config(tmp_path / "nowhere")


def test_a_config_file_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    assert read_hf_config(tmp_path) == LLAMA_3


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_size", "padded"),
    [(32000, 128, 2, 32000), (32001, 128, 2, 32256), (131, 1, 2, 132), (131, 1, 1, 131), (128256, 128, 8, 129024)],
)
def test_the_padded_vocab_size_is_megatrons(vocab_size: int, divisible_by: int, tensor_size: int, padded: int) -> None:
    found = padded_vocab_size(vocab_size, divisible_by=divisible_by, tensor_model_parallel_size=tensor_size)
    assert found == padded
