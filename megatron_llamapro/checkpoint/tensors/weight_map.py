"""The weight map: one row per weight, read in both directions between Hugging Face's names and megatron.core's.

`{layer}` is the global 0-based layer index in both. A shape is a tuple of named dimensions of the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from megatron_llamapro.families.shape import ModelShape

Shape = tuple[int, ...]


class Merge(Enum):
    """How several Hugging Face tensors form one tensor of megatron.core. Either way, it consists of their rows."""

    CONCAT = "concat"
    """All rows of the first, then all rows of the next, …"""
    QKV = "qkv"
    """For each query group in turn: its query heads, its key head, its value head."""


class Sharding(Enum):
    """How megatron.core divides a weight, or each expert's matrix, over tensor-parallel ranks."""

    REPLICATED = "replicated"
    ROWS = "rows"
    """Each rank has contiguous rows (of QKV, whole query groups)."""
    ROWS_BY_PART = "rows by part"
    """Each rank has contiguous rows of each Hugging Face tensor: its gate rows, then its up rows."""
    COLUMNS = "columns"


@dataclass(frozen=True)
class Row:
    """One weight of a block, or of the model outside its blocks."""

    megatron: str
    hugging_face: tuple[tuple[str, tuple[str, ...]], ...]
    """Hugging Face names, each with its dimensions. Names with `{expert}` repeat for each expert, expert by expert."""
    merge: Merge = Merge.CONCAT
    sharding: Sharding = Sharding.REPLICATED
    zero_in_added: bool = False
    """Whether an added block starts with zeros here. The zeros make it an identity (paper, section 3.2)."""
    needs: str | None = None
    """A field or property of ModelShape. The weight exists only if it is true."""
    local_key: str | None = None
    """Its key in `torch_dist` checkpoints of megatron.core's local layers, if it differs from Transformer Engine's."""

    @property
    def per_expert(self) -> bool:
        """Whether megatron.core's tensor has the experts as its first dimension: [experts, rows, columns]."""
        return "{expert}" in self.hugging_face[0][0]


_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_EXPERTS, _HF_EXPERT = _LAYER + "mlp.experts.experts.", _HF_LAYER + "block_sparse_moe.experts.{expert}."

BLOCK_ROWS = (
    Row(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        ((_HF_LAYER + "input_layernorm.weight", ("hidden",)),),
    ),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        (
            (_HF_LAYER + "self_attn.q_proj.weight", ("query", "hidden")),
            (_HF_LAYER + "self_attn.k_proj.weight", ("key_value", "hidden")),
            (_HF_LAYER + "self_attn.v_proj.weight", ("key_value", "hidden")),
        ),
        merge=Merge.QKV,
        sharding=Sharding.ROWS,
    ),
    Row(
        _LAYER + "self_attention.linear_qkv.bias",
        (
            (_HF_LAYER + "self_attn.q_proj.bias", ("query",)),
            (_HF_LAYER + "self_attn.k_proj.bias", ("key_value",)),
            (_HF_LAYER + "self_attn.v_proj.bias", ("key_value",)),
        ),
        merge=Merge.QKV,
        sharding=Sharding.ROWS,
        needs="add_qkv_bias",
    ),
    Row(
        _LAYER + "self_attention.q_layernorm.weight",
        ((_HF_LAYER + "self_attn.q_norm.weight", ("head",)),),
        needs="qk_layernorm",
    ),
    Row(
        _LAYER + "self_attention.k_layernorm.weight",
        ((_HF_LAYER + "self_attn.k_norm.weight", ("head",)),),
        needs="qk_layernorm",
    ),
    Row(
        _LAYER + "self_attention.linear_proj.weight",
        ((_HF_LAYER + "self_attn.o_proj.weight", ("hidden", "query")),),
        sharding=Sharding.COLUMNS,
        zero_in_added=True,
    ),
    Row(
        _LAYER + "self_attention.linear_proj.bias",
        ((_HF_LAYER + "self_attn.o_proj.bias", ("hidden",)),),
        zero_in_added=True,
        needs="add_bias_linear",
    ),
    # A dense feed-forward.
    Row(
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        ((_HF_LAYER + "post_attention_layernorm.weight", ("hidden",)),),
        needs="is_dense",
    ),
    Row(
        _LAYER + "mlp.linear_fc1.weight",
        (
            (_HF_LAYER + "mlp.gate_proj.weight", ("feed_forward", "hidden")),
            (_HF_LAYER + "mlp.up_proj.weight", ("feed_forward", "hidden")),
        ),
        sharding=Sharding.ROWS_BY_PART,
        needs="is_dense",
    ),
    Row(
        _LAYER + "mlp.linear_fc1.bias",
        (
            (_HF_LAYER + "mlp.gate_proj.bias", ("feed_forward",)),
            (_HF_LAYER + "mlp.up_proj.bias", ("feed_forward",)),
        ),
        sharding=Sharding.ROWS_BY_PART,
        needs="add_bias_linear",
    ),
    Row(
        _LAYER + "mlp.linear_fc2.weight",
        ((_HF_LAYER + "mlp.down_proj.weight", ("hidden", "feed_forward")),),
        sharding=Sharding.COLUMNS,
        zero_in_added=True,
        needs="is_dense",
    ),
    Row(
        _LAYER + "mlp.linear_fc2.bias",
        ((_HF_LAYER + "mlp.down_proj.bias", ("hidden",)),),
        zero_in_added=True,
        needs="add_bias_linear",
    ),
    # A mixture of experts. Every expert's output projection is zeroed, so their sum is zero for any routing.
    Row(
        _LAYER + "pre_mlp_layernorm.weight",
        ((_HF_LAYER + "post_attention_layernorm.weight", ("hidden",)),),
        needs="is_moe",
        local_key=_LAYER + "mlp.linear_fc1.layer_norm_weight",
    ),
    Row(
        _LAYER + "mlp.router.weight",
        ((_HF_LAYER + "block_sparse_moe.gate.weight", ("experts", "hidden")),),
        needs="is_moe",
    ),
    Row(
        _EXPERTS + "linear_fc1.weight",
        (
            (_HF_EXPERT + "w1.weight", ("feed_forward", "hidden")),
            (_HF_EXPERT + "w3.weight", ("feed_forward", "hidden")),
        ),
        sharding=Sharding.ROWS_BY_PART,
        needs="is_moe",
    ),
    Row(
        _EXPERTS + "linear_fc2.weight",
        ((_HF_EXPERT + "w2.weight", ("hidden", "feed_forward")),),
        sharding=Sharding.COLUMNS,
        zero_in_added=True,
        needs="is_moe",
    ),
)
EMBEDDING = Row(
    "embedding.word_embeddings.weight",
    (("model.embed_tokens.weight", ("vocabulary", "hidden")),),
    sharding=Sharding.ROWS,
)
FINAL_NORM = Row("decoder.final_layernorm.weight", (("model.norm.weight", ("hidden",)),))
OUTPUT_LAYER = Row(
    "output_layer.weight",
    (("lm_head.weight", ("vocabulary", "hidden")),),
    sharding=Sharding.ROWS,
)

VOCABULARY_ROWS = frozenset({EMBEDDING.megatron, OUTPUT_LAYER.megatron})
"""Weights that megatron.core pads to more rows than the vocabulary has."""

_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Weight:
    """A row applied to one layer of one model: a tensor of a Megatron checkpoint."""

    row: Row
    layer: int | None
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]

    @cached_property
    def megatron_name(self) -> str:
        return self.row.megatron.format(layer=self.layer)

    @property
    def megatron_names(self) -> tuple[str, ...]:
        """All keys that it may have in a `torch_dist` checkpoint."""
        local = self.row.local_key
        return (self.megatron_name,) if local is None else (self.megatron_name, local.format(layer=self.layer))

    @property
    def megatron_shape(self) -> Shape:
        """Its shape, without padding of the vocabulary."""
        rows, columns = sum(shape[0] for shape in self.hf_shapes), self.hf_shapes[0][1:]
        return (self.num_experts, rows // self.num_experts, *columns) if self.row.per_expert else (rows, *columns)

    @property
    def num_experts(self) -> int:
        """The number of experts in the tensor; 1 if it is not per expert."""
        return len(self.hf_names) // len(self.row.hugging_face)


def weights_of(shape: ModelShape) -> list[Weight]:
    """Return every weight of a model of this shape, in the order of the forward pass."""
    rows = [row for row in BLOCK_ROWS if row.needs is None or getattr(shape, row.needs)]
    blocks = [_resolve(row, shape, layer) for layer in range(shape.num_layers) for row in rows]
    weights = [_resolve(EMBEDDING, shape), *blocks, _resolve(FINAL_NORM, shape)]
    return weights if shape.tie_word_embeddings else [*weights, _resolve(OUTPUT_LAYER, shape)]


def hf_shapes(shape: ModelShape) -> dict[str, Shape]:
    """Return the name and shape of every tensor that a Hugging Face checkpoint of this shape must have."""
    return {
        name: size for weight in weights_of(shape) for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True)
    }


def is_known_extra(name: str, shape: ModelShape) -> bool:
    """Return whether a Hugging Face tensor may be left out: a rotary buffer (always computed), or the copy of a tied
    head."""
    if name == OUTPUT_LAYER.hugging_face[0][0]:
        return shape.tie_word_embeddings
    return _ROTARY_BUFFER.fullmatch(name) is not None


def is_norm(name: str) -> bool:
    """Return whether a Hugging Face tensor is a norm's scale."""
    return name.endswith("norm.weight")


def is_block_norm(name: str) -> bool:
    """Return whether a Hugging Face tensor is the scale of a norm before attention or feed-forward."""
    return name.endswith("layernorm.weight")


def layer_of(name: str) -> int | None:
    """Return the layer of a Hugging Face tensor, or None if it is outside the blocks."""
    found = _HF_LAYER_NAME.match(name)
    return int(found[2]) if found else None


def hf_name_in_layer(name: str, layer: int) -> str:
    """Return the name in another layer: model.layers.3.mlp.up_proj.weight, 7 → model.layers.7.mlp.up_proj.weight."""
    return _HF_LAYER_NAME.sub(rf"\g<1>{layer}.", name, count=1)


_HF_LAYER_NAME = re.compile(r"^(model\.layers\.)(\d+)\.")


def _resolve(row: Row, shape: ModelShape, layer: int | None = None) -> Weight:
    sizes = {
        "hidden": shape.hidden_size,
        "query": shape.num_attention_heads * shape.kv_channels,
        "key_value": shape.num_query_groups * shape.kv_channels,
        "head": shape.kv_channels,
        "feed_forward": shape.ffn_hidden_size,
        "experts": shape.num_moe_experts or 1,
        "vocabulary": shape.vocab_size,
    }
    experts = range(shape.num_moe_experts or 1) if row.per_expert else [None]
    names = [
        (name.format(layer=layer, expert=expert), tuple(sizes[dimension] for dimension in dimensions))
        for expert in experts
        for name, dimensions in row.hugging_face
    ]
    return Weight(
        row=row,
        layer=layer,
        hf_names=tuple(name for name, _ in names),
        hf_shapes=tuple(size for _, size in names),
    )


def iter_hf(weights: list[Weight]) -> Iterator[tuple[Weight, str, Shape]]:
    """Yield every Hugging Face tensor with the weight that it belongs to, in order."""
    for weight in weights:
        for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True):
            yield weight, name, size


def frozen_names(shape: ModelShape, trained: Collection[str]) -> list[str]:
    """Return the Hugging Face names of the weights whose megatron.core keys are not in `trained`."""
    frozen = (weight for weight in weights_of(shape) if not {*weight.megatron_names} & {*trained})
    return [name for weight in frozen for name in weight.hf_names]


@dataclass(frozen=True)
class RowBlock:
    """Rows that are contiguous both in a Hugging Face tensor and in megatron.core's."""

    part: str
    """Name of the Hugging Face tensor."""
    part_start: int
    """First row in the Hugging Face tensor."""
    merged_start: int
    """First row in megatron.core's tensor, whose leading dimensions are flattened into rows."""
    num_rows: int


def row_blocks(weight: Weight, shape: ModelShape) -> Iterator[RowBlock]:
    """Yield the rows of megatron.core's tensor, in order, with the Hugging Face tensor that each belongs to."""
    runs = 1 if weight.row.merge is Merge.CONCAT else shape.num_query_groups
    position = 0
    for run in range(runs):
        for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True):
            rows = size[0] // runs
            yield RowBlock(name, run * rows, position, rows)
            position += rows
