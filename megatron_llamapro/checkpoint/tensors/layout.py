"""Where every byte of a model's weights lies, in any format: pieces of Hugging Face's tensors at places in files.

A format's reader makes such a map of files that are there, its writer of files to come; converting is copying from one
map to the other. Pure. Every tensor is seen as a matrix: its first dimension are the rows, the others the columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.tensors.weight_map import Shape, Weight, row_blocks
from megatron_llamapro.families.shape import ModelShape

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""Of a safetensors file."""

Span = tuple[int, int]
"""From the first to the one behind the last."""


@dataclass(frozen=True)
class Piece:
    """Some rows, and of them some columns, of a tensor: row-major in `file` from byte `offset` on."""

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
    """A tensor, in as many pieces as it is divided into."""

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
    """A file to be written: what of it is known beforehand. The rest is tensors' bytes, or zeros."""

    path: Path
    num_bytes: int
    fixed: tuple[tuple[int, bytes], ...]
    """(offset, bytes)"""


@dataclass(frozen=True)
class TargetLayout:
    """A checkpoint to be written."""

    tensors: Mapping[str, tuple[StoredTensor, ...]]
    """Where each goes, by Hugging Face name, in the order in which they are best written; some formats hold copies."""
    files: tuple[TargetFile, ...]
    small_files: Mapping[str, bytes]
    """Whole contents by name: indices and the like."""


def num_columns(shape: Shape) -> int:
    """Elements of a row."""
    return math.prod(shape[1:])


def whole(shape: Shape, file: Path, offset: int) -> StoredTensor:
    """A tensor in one piece."""
    return StoredTensor(shape, (Piece((0, shape[0]), (0, num_columns(shape)), file, offset),))


def parts_of(weight: Weight, pieces: Iterable[Piece], *, shape: ModelShape, itemsize: int) -> dict[str, StoredTensor]:
    """Hugging Face's tensors of a weight, from the pieces of megatron.core's one tensor (seen as a matrix).

    Rows beyond the tensor's own (a padded vocabulary) are left out.
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
    """Whether a tensor's pieces are exactly the whole, in bands of rows or of columns: no gap, no overlap."""
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
