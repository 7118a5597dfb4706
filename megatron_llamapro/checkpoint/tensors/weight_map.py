"""The weight map: one row a weight, read in both directions between Hugging Face's names and megatron.core's.

`{layer}` is the global 0-based layer index in both. Shapes are products of named dimensions of the model's shape.
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
    """How Hugging Face's tensors become megatron.core's one. Either way its bytes are ranges of their rows."""

    CONCAT = "concat"
    """All rows of the first, then all rows of the next, …"""
    QKV = "qkv"
    """Rows by query group: its query heads, its key head, its value head."""


class Sharding(Enum):
    """How megatron.core divides a weight over tensor-parallel ranks; of experts, each one's matrix."""

    REPLICATED = "replicated"
    ROWS = "rows"
    """Every rank has the next rows (whole query groups of QKV)."""
    ROWS_BY_PART = "rows by part"
    """Every rank has the next rows of each Hugging Face tensor: its gate rows, then its up rows."""
    COLUMNS = "columns"


@dataclass(frozen=True)
class Row:
    """One weight of a block, or of the model outside its blocks."""

    megatron: str
    hugging_face: tuple[tuple[str, tuple[str, ...]], ...]
    """Names there, each with its dimensions. With `{expert}` in them they come once an expert, expert by expert."""
    merge: Merge = Merge.CONCAT
    sharding: Sharding = Sharding.REPLICATED
    zero_in_added: bool = False
    """Whether an added block starts with zeros here, which makes it an identity (paper, section 3.2)."""
    needs: str | None = None
    """The field (or property) of ModelShape without which there is no such weight."""
    local_key: str | None = None
    """Its key in `torch_dist` checkpoints of megatron.core's local layers, where that is not Transformer Engine's."""

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
    # A mixture of experts. With every expert's output projection zeroed, their sum is zero however tokens are routed.
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
"""megatron.core pads these to more rows than the vocabulary has."""

_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Weight:
    """A row for one layer of one model: a tensor of the Megatron checkpoint."""

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
        """Without padding of the vocabulary."""
        rows, columns = sum(shape[0] for shape in self.hf_shapes), self.hf_shapes[0][1:]
        return (self.num_experts, rows // self.num_experts, *columns) if self.row.per_expert else (rows, *columns)

    @property
    def num_experts(self) -> int:
        """Experts that the tensor holds; 1 where it holds none."""
        return len(self.hf_names) // len(self.row.hugging_face)


def weights_of(shape: ModelShape) -> list[Weight]:
    """Every weight of a model of this shape, in the order of the forward pass."""
    rows = [row for row in BLOCK_ROWS if row.needs is None or getattr(shape, row.needs)]
    blocks = [_resolve(row, shape, layer) for layer in range(shape.num_layers) for row in rows]
    weights = [_resolve(EMBEDDING, shape), *blocks, _resolve(FINAL_NORM, shape)]
    return weights if shape.tie_word_embeddings else [*weights, _resolve(OUTPUT_LAYER, shape)]


def hf_shapes(shape: ModelShape) -> dict[str, Shape]:
    """Name and shape of every tensor that a Hugging Face checkpoint of this shape must have."""
    return {
        name: size for weight in weights_of(shape) for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True)
    }


def is_known_extra(name: str, shape: ModelShape) -> bool:
    """Whether a Hugging Face tensor may be left out: a rotary buffer, which is computed, or the stored copy of a tied
    head."""
    if name == OUTPUT_LAYER.hugging_face[0][0]:
        return shape.tie_word_embeddings
    return _ROTARY_BUFFER.fullmatch(name) is not None


def is_norm(name: str) -> bool:
    """Whether a Hugging Face tensor is a norm's scale."""
    return name.endswith("norm.weight")


def is_block_norm(name: str) -> bool:
    """Whether a Hugging Face tensor is the scale of a norm before attention or feed-forward."""
    return name.endswith("layernorm.weight")


def layer_of(name: str) -> int | None:
    """The layer of a Hugging Face tensor; None for one outside the blocks."""
    found = _HF_LAYER_NAME.match(name)
    return int(found[2]) if found else None


def hf_name_in_layer(name: str, layer: int) -> str:
    """The same tensor of another layer: model.layers.3.mlp.up_proj.weight, 7 → model.layers.7.mlp.up_proj.weight."""
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
    """Every Hugging Face tensor with the weight that it belongs to, in order."""
    for weight in weights:
        for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True):
            yield weight, name, size


def frozen_names(shape: ModelShape, trained: Collection[str]) -> list[str]:
    """Hugging Face names of the weights that are not among `trained`, which are megatron.core's keys."""
    frozen = (weight for weight in weights_of(shape) if not {*weight.megatron_names} & {*trained})
    return [name for weight in frozen for name in weight.hf_names]


@dataclass(frozen=True)
class RowBlock:
    """Rows that stay together."""

    part: str
    """Name of Hugging Face's tensor."""
    part_start: int
    """Their first row there."""
    merged_start: int
    """Their first row in megatron.core's tensor, whose leading dimensions are flattened into rows."""
    num_rows: int


def row_blocks(weight: Weight, shape: ModelShape) -> Iterator[RowBlock]:
    """The rows of megatron.core's tensor, in order, and whose they are."""
    runs = 1 if weight.row.merge is Merge.CONCAT else shape.num_query_groups
    position = 0
    for run in range(runs):
        for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True):
            rows = size[0] // runs
            yield RowBlock(name, run * rows, position, rows)
            position += rows
