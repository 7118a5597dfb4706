"""How the rows of Hugging Face's tensors lie in megatron.core's. Pure; nothing is computed, rows only move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llamapro.checkpoint.weight_map import Merge, Weight
from megatron_llamapro.model.shape import ModelShape


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
