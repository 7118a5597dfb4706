"""The parts of weights that each rank of a `legacy` checkpoint holds, and their names. Pure.

A rank's file holds the tensors of its chunks under stage-local names (`decoder.layers.0` is the chunk's first layer).
Each tensor is the rank's part of the whole. Megatron-LM's `save_checkpoint` wrote this before distributed checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_llamapro.checkpoint.formats.megatron_tensors import matrix
from megatron_llamapro.checkpoint.tensors.layout import Span
from megatron_llamapro.checkpoint.tensors.weight_map import (
    EMBEDDING,
    OUTPUT_LAYER,
    VOCABULARY_ROWS,
    Shape,
    Sharding,
    Weight,
    weights_of,
)
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.shape import ModelShape


class LayerSpec(str, Enum):
    """Whose layers a file is for. They name their norms differently, so one file cannot serve both."""

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


# Names of the norms before fused linears in Transformer Engine -> their names in megatron.core's own layers.
_LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Grid:
    """How a model is divided over ranks."""

    tensor_size: int
    stage_layers: tuple[int, ...]
    """Layers of every (virtual) stage: chunk 0 of every stage, then chunk 1, …"""
    virtual_size: int | None = None
    """Chunks per stage; None: one, without the interleaved schedule."""

    def __str__(self) -> str:
        virtual = f" x virtual {self.virtual_size}" if self.virtual_size else ""
        return f"TP {self.tensor_size} x PP {self.pipeline_size}{virtual}"

    @property
    def pipeline_size(self) -> int:
        return len(self.stage_layers) // (self.virtual_size or 1)

    def chunk(self, stage: int, number: int) -> range:
        """Return the global layers of a stage's chunk."""
        place = number * self.pipeline_size + stage
        first = sum(self.stage_layers[:place])
        return range(first, first + self.stage_layers[place])


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of megatron.core's whole tensor (as a matrix) that are stored together, row-major."""

    rows: Span
    columns: Span

    @property
    def num_elements(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class RankEntry:
    """A tensor in a rank's file."""

    name: str
    shape: Shape
    weight: Weight
    rectangles: tuple[Rectangle, ...]
    """The parts of the weight that it holds, in order. Padding rows of a vocabulary are not among them."""


def check_grid(grid: Grid, shape: ModelShape) -> None:
    """Raise `CheckpointError` if the model cannot be divided like this."""
    if sum(grid.stage_layers) != shape.num_layers or len(grid.stage_layers) % (grid.virtual_size or 1):
        raise CheckpointError(
            f"stages of {', '.join(map(str, grid.stage_layers))} layers do not fit a model of {shape.num_layers} layers"
        )
    counts = {"query groups": shape.num_query_groups, "feed-forward columns": shape.ffn_hidden_size}
    for name, count in counts.items():
        if count % grid.tensor_size:
            raise CheckpointError(
                f"the model's {count} {name} cannot be divided by tensor_model_parallel_size {grid.tensor_size}"
            )


def chunk_entries(
    shape: ModelShape, grid: Grid, *, stage: int, chunk: int, tensor_rank: int, spec: LayerSpec, padded_vocab_size: int
) -> Iterator[RankEntry]:
    """Yield every tensor of one chunk of one rank."""
    layers = grid.chunk(stage, chunk)
    is_first = stage == 0 and chunk == 0
    is_last = stage == grid.pipeline_size - 1 and chunk == (grid.virtual_size or 1) - 1
    for weight in weights_of(shape):
        if weight.layer is not None and weight.layer in layers:
            yield from _entries(weight, grid, tensor_rank, _local_name(weight, layers.start, spec), padded_vocab_size)
        if weight.layer is None and (is_first if weight.row is EMBEDDING else is_last):
            yield from _entries(weight, grid, tensor_rank, weight.megatron_name, padded_vocab_size)
        if weight.row is EMBEDDING and shape.tie_word_embeddings and is_last and not is_first:
            yield from _entries(weight, grid, tensor_rank, OUTPUT_LAYER.megatron, padded_vocab_size)


def _local_name(weight: Weight, first_layer: int, spec: LayerSpec) -> str:
    template = weight.row.megatron
    if spec is LayerSpec.LOCAL:
        for fused, local in _LOCAL_NORMS.items():
            template = template.replace(fused, local)
    assert weight.layer is not None
    return template.format(layer=weight.layer - first_layer)


def _entries(weight: Weight, grid: Grid, rank: int, name: str, padded_vocab_size: int) -> Iterator[RankEntry]:
    """Yield a rank's part of a weight: one tensor, or one per expert, which legacy files store separately."""
    if not weight.row.per_expert:
        all_rows = padded_vocab_size if weight.row.megatron in VOCABULARY_ROWS else matrix(weight.megatron_shape)[0]
        yield _entry(weight, grid, rank, name, 0, weight.hf_shapes, all_rows)
        return
    parts = len(weight.row.hugging_face)
    rows = sum(size[0] for size in weight.hf_shapes[:parts])
    for expert in range(weight.num_experts):
        path = name.replace("experts.experts.", f"experts.local_experts.{expert}.")
        yield _entry(weight, grid, rank, path, expert * rows, weight.hf_shapes[:parts], rows)


def _entry(
    weight: Weight, grid: Grid, rank: int, name: str, first_row: int, parts: Sequence[Shape], all_rows: int
) -> RankEntry:
    """Return a rank's part of a matrix that starts at row `first_row`. `parts` are the Hugging Face tensors in it."""
    columns, size = matrix(parts[0])[1], grid.tensor_size
    held = sum(part[0] for part in parts)
    width = columns
    if weight.row.sharding is Sharding.REPLICATED:
        spans, num_rows = [(0, held)], held
    elif weight.row.sharding is Sharding.COLUMNS:
        spans, num_rows, width = [(0, held)], held, columns // size
    elif weight.row.sharding is Sharding.ROWS:
        num_rows = all_rows // size
        spans = [(rank * num_rows, min((rank + 1) * num_rows, held))]
    else:
        spans = [_share(part[0], rank, size, sum(other[0] for other in parts[:i])) for i, part in enumerate(parts)]
        num_rows = held // size
    across = (rank * width, (rank + 1) * width) if width < columns else (0, columns)
    rectangles = [Rectangle((first_row + start, first_row + stop), across) for start, stop in spans if start < stop]
    return RankEntry(name, (num_rows,) if len(parts[0]) == 1 else (num_rows, width), weight, tuple(rectangles))


def _share(count: int, rank: int, size: int, offset: int) -> Span:
    """Return a rank's equal share of `count` rows that start at `offset`."""
    each = count // size
    return offset + rank * each, offset + (rank + 1) * each
