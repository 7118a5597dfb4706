"""Fills a model from an opened checkpoint of any format, at any parallelism, without writing another checkpoint.

Each rank reads only the rows of its own part, as the model computes them: with adapters merged and the dial applied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_llamapro.checkpoint.formats.adapters import rows_of
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.tensors.layout import num_columns
from megatron_llamapro.checkpoint.tensors.streaming import CHUNK_BYTES, SourceFiles
from megatron_llamapro.checkpoint.tensors.weight_map import Weight, row_blocks, weights_of
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.training.checkpoints.state import model_state


def fill(
    chunks: Sequence[torch.nn.Module],
    checkpoint: Checkpoint,
    files: SourceFiles,
    *,
    dtype: str,
    only: Collection[str] | None = None,
) -> None:
    """Fill this rank's chunks with the checkpoint's weights, cast to `dtype`, the type of the chunks' weights.

    `only` are the Hugging Face names of the tensors to read; the others stay as they are.

    Raises:
        CheckpointError: a file changed since the checkpoint was opened, or a value does not fit `dtype`.
    """
    weights = {name: weight for weight in weights_of(checkpoint.shape) for name in weight.megatron_names}
    for sharded in _parts(chunks):
        weight = weights[sharded.key]
        if only is None or not {*weight.hf_names}.isdisjoint(only):
            with torch.no_grad():
                sharded.data.copy_(_read(weight, sharded, checkpoint, files, dtype))


def _parts(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Yield every part of a weight that this rank holds. Its data are the model's own, not a copy."""
    state = model_state(chunks)
    apply_factories(state)
    for part in nested_values(state):
        assert isinstance(part, ShardedTensor)
        yield part


def _read(weight: Weight, part: ShardedTensor, checkpoint: Checkpoint, files: SourceFiles, dtype: str) -> torch.Tensor:
    """Return one part of a weight, in the part's shape. Rows beyond the vocabulary are zeros."""
    itemsize = ITEMSIZES[dtype]
    columns = num_columns(weight.hf_shapes[0])
    first, num_rows = _rows_of_part(weight, part)
    whole_rows = numpy.zeros((num_rows, columns * itemsize), numpy.uint8)
    parts = {name: rows_of(checkpoint, name, files, dtype=dtype) for name in weight.hf_names}
    portion = max(1, CHUNK_BYTES // max(1, columns * itemsize))
    for block in row_blocks(weight, checkpoint.shape):
        end = min(first + num_rows, block.merged_start + block.num_rows)
        for start in range(max(first, block.merged_start), end, portion):
            offset = block.part_start + start - block.merged_start
            parts[block.part].fill(offset, whole_rows[start - first : min(start + portion, end) - first])
    values = torch.from_numpy(whole_rows).view(getattr(torch, dtype))
    is_matrix = len(part.local_shape) > 1
    if is_matrix:
        values = values[:, part.global_offset[-1] :][:, : part.local_shape[-1]]
    return values.reshape(part.local_shape)


def _rows_of_part(weight: Weight, part: ShardedTensor) -> tuple[int, int]:
    """Return a part's first row among the weight's, whose leading dimensions are flattened, and its number of rows."""
    is_matrix = len(part.local_shape) > 1
    leading = part.global_offset[:-1] if is_matrix else part.global_offset
    sizes = weight.megatron_shape[:-1] if is_matrix else weight.megatron_shape
    first = 0
    for offset, size in zip(leading, sizes, strict=True):
        first = first * size + offset
    return first, math.prod(part.local_shape[:-1] if is_matrix else part.local_shape)
