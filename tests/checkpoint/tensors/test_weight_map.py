"""The weight map matches rows of both formats one to one for any shape, and is complete."""

from __future__ import annotations

import numpy
from hypothesis import given
from hypothesis import strategies as st

from megatron_llamapro.checkpoint.formats.megatron_tensors import matrix
from megatron_llamapro.checkpoint.tensors.weight_map import (
    Merge,
    Weight,
    hf_name_in_layer,
    hf_shapes,
    is_known_extra,
    row_blocks,
    weights_of,
)
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.testing.tiny_models import tiny_shape


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    groups = draw(st.integers(1, 4))
    experts = draw(st.none() | st.integers(2, 4))
    all_biases = experts is None and draw(st.booleans())
    return tiny_shape(
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        kv_channels=2 * draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 16)),
        ffn_hidden_size=draw(st.integers(1, 16)),
        tie_word_embeddings=draw(st.booleans()),
        add_qkv_bias=all_biases or draw(st.booleans()),
        add_bias_linear=all_biases,
        qk_layernorm=draw(st.booleans()),
        num_moe_experts=experts,
    )


def merged(weight: Weight, parts: dict[str, numpy.ndarray], shape: ModelShape) -> numpy.ndarray:
    """Assemble megatron.core's rows as the row blocks say."""
    return numpy.concatenate([parts[b.part][b.part_start :][: b.num_rows] for b in row_blocks(weight, shape)])


@given(shapes())
def test_every_row_has_exactly_one_place(shape: ModelShape) -> None:
    """Blocks are contiguous in megatron.core's tensor, and cover every row of every part once."""
    for weight in weights_of(shape):
        blocks = list(row_blocks(weight, shape))
        ends = [block.merged_start + block.num_rows for block in blocks]
        assert [block.merged_start for block in blocks] == [0, *ends[:-1]]
        assert ends[-1] == matrix(weight.megatron_shape)[0]
        rows = [(block.part, block.part_start + i) for block in blocks for i in range(block.num_rows)]
        wanted = [
            (name, i) for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True) for i in range(size[0])
        ]
        assert sorted(rows) == sorted(wanted)


@given(shapes())
def test_every_query_head_lies_with_its_key_and_value(shape: ModelShape) -> None:
    """Mark each row of q, k and v with its group, for weights and biases."""
    groups = numpy.arange(shape.num_query_groups)
    weights = [weight for weight in weights_of(shape) if weight.row.merge is Merge.QKV]
    assert len(weights) == shape.num_layers * (2 if shape.add_qkv_bias else 1)
    for weight in weights:
        parts = {
            name: groups.repeat(size[0] // len(groups))
            for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True)
        }
        together = merged(weight, parts, shape)
        assert (together == groups.repeat(len(together) // len(groups))).all()


@given(shapes())
def test_names_are_distinct_in_both_directions(shape: ModelShape) -> None:
    weights = weights_of(shape)
    hf_names = [name for weight in weights for name in weight.hf_names]
    feed_forward = 1 + 3 * shape.num_moe_experts if shape.num_moe_experts else 3
    biases = 3 * shape.add_qkv_bias + 4 * shape.add_bias_linear
    in_block = 6 + biases + 2 * shape.qk_layernorm + feed_forward
    outside = 2 if shape.tie_word_embeddings else 3
    assert len(hf_names) == len(set(hf_names)) == len(hf_shapes(shape)) == in_block * shape.num_layers + outside
    assert len({weight.megatron_name for weight in weights}) == len(weights)
    zeroed = {name for weight in weights for name in weight.hf_names if weight.row.zero_in_added}
    assert all(name.rpartition(".")[0].endswith(("o_proj", "down_proj", "w2")) for name in zeroed)
    assert len(zeroed) == shape.num_layers * (1 + (shape.num_moe_experts or 1) + 2 * shape.add_bias_linear)


def test_layers_are_matched_by_whole_number() -> None:
    """Not by substring: 4 is not 40."""
    assert hf_name_in_layer("model.layers.4.mlp.up_proj.weight", 40) == "model.layers.40.mlp.up_proj.weight"
    assert hf_name_in_layer("model.layers.40.mlp.up_proj.weight", 4) == "model.layers.4.mlp.up_proj.weight"
    assert hf_name_in_layer("model.norm.weight", 4) == "model.norm.weight"


def test_rotary_buffers_and_tied_heads_are_known_extras() -> None:
    untied, tied = tiny_shape(), tiny_shape(tie_word_embeddings=True)
    assert is_known_extra("lm_head.weight", tied) and not is_known_extra("lm_head.weight", untied)
    assert is_known_extra("model.layers.3.self_attn.rotary_emb.inv_freq", untied)
    assert is_known_extra("model.rotary_emb.inv_freq", untied)
    assert not is_known_extra("model.layers.3.self_attn.q_proj.bias", untied)
