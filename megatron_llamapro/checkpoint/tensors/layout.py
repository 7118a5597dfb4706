"""The layout of a model's weights in any format: which bytes of which file hold which piece of each tensor.

A format's reader makes such a layout of existing files, and its writer makes one of new files. A conversion copies from
one layout to the other. Tensors have Hugging Face's names. Each is treated as a matrix: the first dimension is its
rows, the others are its columns. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.tensors.weight_map import Shape, Weight, row_blocks
from megatron_llamapro.families.shape import ModelShape

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""Largest safetensors file, unless it holds a single larger tensor."""

Span = tuple[int, int]
"""(start, stop), as in `range`: stop is not included."""


@dataclass(frozen=True)
class Piece:
    """Some columns of some rows of a tensor, stored row-major in `file` from byte `offset`."""

    rows: Span
    columns: Span
    file: Path
    offset: int

    @property
    def num_columns(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def num_elements(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.num_columns


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the pieces that it is stored in."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def num_columns(self) -> int:
        return num_columns(self.shape)


@dataclass(frozen=True)
class TargetFile:
    """A file to write, with the bytes that are known in advance. The rest holds tensors, or zeros."""

    path: Path
    num_bytes: int
    fixed: tuple[tuple[int, bytes], ...]
    """(offset, bytes)"""


@dataclass(frozen=True)
class TargetLayout:
    """A checkpoint to write."""

    tensors: Mapping[str, tuple[StoredTensor, ...]]
    """Where each tensor goes, by Hugging Face name, in the best order to write. Some formats store copies."""
    files: tuple[TargetFile, ...]
    small_files: Mapping[str, bytes]
    """The contents of other files by name, for example an index."""


def num_columns(shape: Shape) -> int:
    """Return the number of elements in a row."""
    return math.prod(shape[1:])


def whole(shape: Shape, file: Path, offset: int) -> StoredTensor:
    """Return a tensor that is stored in one piece."""
    return StoredTensor(shape, (Piece((0, shape[0]), (0, num_columns(shape)), file, offset),))


def parts_of(weight: Weight, pieces: Iterable[Piece], *, shape: ModelShape, itemsize: int) -> dict[str, StoredTensor]:
    """Return the Hugging Face tensors of a weight, given the pieces of megatron.core's one tensor (as a matrix).

    Rows that pad a vocabulary are left out.
    """
    found: dict[str, list[Piece]] = {name: [] for name in weight.hf_names}
    by_row = sorted(pieces, key=lambda piece: piece.rows)
    for block in row_blocks(weight, shape):
        first, last = block.merged_start, block.merged_start + block.num_rows
        shift = block.part_start - first
        for piece in by_row:
            start, stop = max(first, piece.rows[0]), min(last, piece.rows[1])
            if start < stop:
                skipped = (start - piece.rows[0]) * piece.num_columns * itemsize
                rows = (start + shift, stop + shift)
                found[block.part].append(Piece(rows, piece.columns, piece.file, piece.offset + skipped))
    shapes = zip(weight.hf_names, weight.hf_shapes, strict=True)
    return {name: StoredTensor(size, tuple(found[name])) for name, size in shapes}


def is_whole(tensor: StoredTensor) -> bool:
    """Return whether a tensor's pieces cover it without gap or overlap, in bands of rows or of columns."""
    spans = [(piece.rows, piece.columns) for piece in tensor.pieces]
    turned = [(columns, rows) for rows, columns in spans]
    return _tile(spans, tensor.num_rows, tensor.num_columns) or _tile(turned, tensor.num_columns, tensor.num_rows)


def _tile(spans: Iterable[tuple[Span, Span]], height: int, width: int) -> bool:
    bands: dict[Span, list[Span]] = {}
    for band, across in spans:
        bands.setdefault(band, []).append(across)
    return _tiles(sorted(bands), height) and all(_tiles(sorted(parts), width) for parts in bands.values())


def _tiles(spans: Sequence[Span], length: int) -> bool:
    position = 0
    for start, stop in spans:
        if start != position or stop <= start:
            return False
        position = stop
    return position == length
