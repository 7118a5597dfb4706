"""Merging and splitting are inverse, bit for bit, whatever the shape; the rows of the weight map are complete."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llamapro.checkpoint.transforms import cast, merge, raw_bytes, same_bytes, split
from megatron_llamapro.checkpoint.weight_map import Merge, hf_name_in_layer, hf_shapes, is_known_extra, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.shape import ModelShape

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=10,
    layernorm_epsilon=1e-5,
    max_position_embeddings=16,
    rotary_base=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    groups = draw(st.integers(1, 4))
    return dataclasses.replace(
        SHAPE,
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        kv_channels=2 * draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 16)),
        ffn_hidden_size=draw(st.integers(1, 16)),
        tie_word_embeddings=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        num_moe_experts=draw(st.none() | st.integers(2, 4)),
    )


@given(shapes(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_split_undoes_merge(shape: ModelShape, dtype: torch.dtype) -> None:
    for weight in weights_of(shape):
        parts = [torch.randn(size).to(dtype) for size in weight.hf_shapes]
        merged = merge(weight, parts, shape)
        assert tuple(merged.shape) == weight.megatron_shape
        back = split(weight, merged, shape)
        assert all(same_bytes(one, other) for one, other in zip(parts, back, strict=True))


@given(shapes())
def test_every_query_head_lies_with_its_key_and_value(shape: ModelShape) -> None:
    """Row by row, of weights and biases: each row of q, k and v is marked with its group."""
    groups = torch.arange(shape.num_query_groups).float()

    def marked(size: tuple[int, ...]) -> torch.Tensor:
        return groups.repeat_interleave(size[0] // len(groups)).reshape(-1, *[1] * (len(size) - 1)).expand(size)

    weights = [weight for weight in weights_of(shape) if weight.row.merge is Merge.QKV]
    assert len(weights) == shape.num_layers * (2 if shape.add_qkv_bias else 1)
    for weight in weights:
        merged = merge(weight, [marked(size) for size in weight.hf_shapes], shape)
        assert torch.equal(merged, marked(weight.megatron_shape))


@given(shapes())
def test_names_are_distinct_in_both_directions(shape: ModelShape) -> None:
    weights = weights_of(shape)
    hf_names = [name for weight in weights for name in weight.hf_names]
    feed_forward = 1 + 3 * shape.num_moe_experts if shape.num_moe_experts else 3
    in_block = 6 + 3 * shape.add_qkv_bias + 2 * shape.qk_layernorm + feed_forward
    outside = 2 if shape.tie_word_embeddings else 3
    assert len(hf_names) == len(set(hf_names)) == len(hf_shapes(shape)) == in_block * shape.num_layers + outside
    assert len({weight.megatron_name for weight in weights}) == len(weights)
    zeroed = {name for weight in weights for name in weight.hf_names if weight.row.zero_in_added}
    assert all(name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")) for name in zeroed)
    assert len(zeroed) == shape.num_layers * (1 + (shape.num_moe_experts or 1))


def test_layers_are_told_apart_by_number() -> None:
    """Not by substring: 4 is not 40."""
    assert hf_name_in_layer("model.layers.4.mlp.up_proj.weight", 40) == "model.layers.40.mlp.up_proj.weight"
    assert hf_name_in_layer("model.layers.40.mlp.up_proj.weight", 4) == "model.layers.4.mlp.up_proj.weight"
    assert hf_name_in_layer("model.norm.weight", 4) == "model.norm.weight"


def test_known_extras() -> None:
    tied = dataclasses.replace(SHAPE, tie_word_embeddings=True)
    assert is_known_extra("lm_head.weight", tied) and not is_known_extra("lm_head.weight", SHAPE)
    assert is_known_extra("model.layers.3.self_attn.rotary_emb.inv_freq", SHAPE)
    assert is_known_extra("model.rotary_emb.inv_freq", SHAPE)
    assert not is_known_extra("model.layers.3.self_attn.q_proj.bias", SHAPE)


def test_casts() -> None:
    halves = torch.tensor([1.0, -0.0, float("inf"), 65504.0])
    assert torch.equal(cast(halves, torch.float16, name="x"), halves.half())
    assert cast(halves, torch.float32, name="x") is halves
    with pytest.raises(CheckpointError, match="x has values that float16 cannot hold"):
        cast(torch.tensor([7e4]), torch.float16, name="x")


def test_bytes() -> None:
    assert bytes(raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).t())) == b"\x01\x03\x02\x04"
    nan = torch.tensor([float("nan")])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
