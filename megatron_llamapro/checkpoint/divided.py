"""Tensors of a torch_dist checkpoint in the parts that ranks saved: of one layer, or of all layers stacked. Pure.

megatron.core stacks layers unless it is told `non_homogeneous_layers`: `decoder.layers.mlp.linear_fc2.weight`, [layers,
rows, columns], is that weight of every layer, norms are [layers, hidden], experts [layers, experts, rows, columns].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megatron_llamapro.checkpoint.layout import Piece
from megatron_llamapro.checkpoint.megatron_model import matrix
from megatron_llamapro.checkpoint.weight_map import Shape
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.families import ITEMSIZES

_STACKED = re.compile(r"(decoder\.layers\.)(?!\d+\.)(.+)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A part of a tensor: row-major in `path` from byte `offset` on."""

    start: Shape
    """Where in the tensor it begins."""
    shape: Shape
    """No dimension is 0."""
    path: Path
    offset: int


@dataclass(frozen=True)
class DividedTensor:
    """A tensor in as many parts as there were ranks that held a part of it."""

    shape: Shape
    dtype: str
    """Of `ITEMSIZES`."""
    parts: tuple[Part, ...]

    def pieces(self) -> Iterator[Piece]:
        """Its parts as pieces of the tensor as a matrix, all dimensions but the last its rows."""
        for part in self.parts:
            yield from _pieces(self, part)


def is_stacked(name: str) -> bool:
    """Whether a key is a weight of all layers."""
    return _STACKED.fullmatch(name) is not None


def unstacked(tensors: Mapping[str, DividedTensor], *, num_layers: int, where: Path) -> dict[str, DividedTensor]:
    """The tensors by key, a stacked one as one a layer, under the keys of layers that were saved each by itself.

    Raises:
        CheckpointError: a stack of another number of layers than the model has, a layer that is there twice.
    """
    found = {name: tensor for name, tensor in tensors.items() if not is_stacked(name)}
    for name in sorted(tensors.keys() - found.keys()):
        tensor = tensors[name]
        if len(tensor.shape) < 2 or tensor.shape[0] != num_layers:
            raise CheckpointError(
                f"{where}: {name} has shape {tensor.shape}: it does not stack the {num_layers} layers of config.json"
            )
        for layer, one in enumerate(_layers(tensor)):
            key = _STACKED.sub(rf"\g<1>{layer}.\g<2>", name)
            if key in found:
                raise CheckpointError(f"{where} has {key} twice: by itself, and in {name}")
            found[key] = one
    return found


def _layers(tensor: DividedTensor) -> list[DividedTensor]:
    parts: list[list[Part]] = [[] for _ in range(tensor.shape[0])]
    for part in tensor.parts:
        start, shape = part.start[1:], part.shape[1:]
        step = math.prod(shape) * ITEMSIZES[tensor.dtype]
        for number in range(part.shape[0]):
            offset = part.offset + number * step
            parts[part.start[0] + number].append(replace(part, start=start, shape=shape, offset=offset))
    return [DividedTensor(tensor.shape[1:], tensor.dtype, tuple(held)) for held in parts]


def _pieces(tensor: DividedTensor, part: Part) -> Iterator[Piece]:
    """One, or of experts one each."""
    leading = [range(start, start + size) for start, size in zip(part.start[:-2], part.shape[:-2], strict=True)]
    start, shape = part.start[-2:], part.shape[-2:]
    num_rows, columns = matrix(shape)
    all_rows, _ = matrix(tensor.shape[-2:])
    first_column = start[1] if len(shape) == 2 else 0
    step = math.prod(shape) * ITEMSIZES[tensor.dtype]
    for number, indices in enumerate(product(*leading)):
        outer = 0
        for index, size in zip(indices, tensor.shape, strict=False):
            outer = outer * size + index
        first = outer * all_rows + start[0]
        rows, where = (first, first + num_rows), (first_column, first_column + columns)
        yield Piece(rows, where, part.path, part.offset + number * step)
