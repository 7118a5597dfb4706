"""Tensors' rows out of files: any portion of them, a few megabytes at a time, and the hash of all.

Nothing here needs torch or as much memory as a tensor. Reading and hashing leave Python's lock.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy
from blake3 import blake3

from megatron_llamapro.checkpoint.layout import Piece, StoredTensor
from megatron_llamapro.config.errors import CheckpointError

CHUNK_BYTES = 4 * 2**20

Progress = Callable[[int], object]
"""Called with the number of bytes that were just done."""


def nothing(num_bytes: int) -> None:
    """The progress that nobody watches."""


class Rows(Protocol):
    """A tensor whose rows can be had in any portion."""

    is_zero: bool
    """Whether every byte is 0: then none needs to be read or written."""

    def fill(self, start: int, out: numpy.ndarray) -> None:
        """Rows from `start` on into `out`, uint8 [rows, bytes a row]."""
        ...


class SourceFiles:
    """Files that are read, opened once, and held against what they were when they were opened."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, os.stat_result]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset` on.

        Raises:
            CheckpointError: the file is gone or shorter than it was.
        """
        descriptor = self._descriptor(path)
        done = 0
        while done < len(out):
            try:
                count = os.preadv(descriptor, [out[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{path} is shorter than it was: it changed while it was being read")
            done += count

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file is not what it was when it was opened."""
        for path, (_, before) in self._open.items():
            try:
                now = path.stat()
            except OSError:
                raise CheckpointError(f"{path} vanished while it was being read") from None
            if _version(now) != _version(before):
                raise CheckpointError(f"{path} changed while it was being read: wait until it is complete, try again")

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    os.close(descriptor)
                    raise CheckpointError(f"{path} is not a file")
                self._open[path] = (descriptor, status)
            return self._open[path][0]


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


class StoredRows:
    """Rows of a tensor that lies in files."""

    is_zero = False

    def __init__(self, tensor: StoredTensor, files: SourceFiles, itemsize: int) -> None:
        self.tensor, self._files, self._itemsize = tensor, files, itemsize

    def fill(self, start: int, out: numpy.ndarray) -> None:
        for piece, rows, columns, offset in overlaps(self.tensor, start, len(out), self._itemsize):
            part = out[rows, columns]
            if part.flags.c_contiguous:
                self._files.read(piece.file, offset, part.reshape(-1).data)
            else:
                values = numpy.empty(part.shape, numpy.uint8)
                self._files.read(piece.file, offset, values.reshape(-1).data)
                part[:] = values


def overlaps(
    tensor: StoredTensor, start: int, num_rows: int, itemsize: int
) -> Iterator[tuple[Piece, slice, slice, int]]:
    """Pieces that hold some of `num_rows` rows from `start`: where in a buffer of those rows, and at which byte."""
    for piece in tensor.pieces:
        first, last = max(start, piece.rows[0]), min(start + num_rows, piece.rows[1])
        if first < last:
            columns = slice(piece.columns[0] * itemsize, piece.columns[1] * itemsize)
            offset = piece.offset + (first - piece.rows[0]) * piece.num_columns * itemsize
            yield piece, slice(first - start, last - start), columns, offset


def read_whole(tensor: StoredTensor, files: SourceFiles, itemsize: int) -> numpy.ndarray:
    """All of a tensor, uint8 [rows, bytes a row]."""
    values = numpy.empty((tensor.num_rows, tensor.num_columns * itemsize), numpy.uint8)
    StoredRows(tensor, files, itemsize).fill(0, values)
    return values


def hash_rows(
    rows: Rows,
    tensor: StoredTensor,
    itemsize: int,
    *,
    each: Callable[[int, numpy.ndarray], object] | None = None,
    progress: Progress = nothing,
) -> str:
    """Content hash (BLAKE3) of a tensor's bytes, row-major; not of its shape or type. `each` is given every portion of
    the rows on the way, with the number of its first row."""
    hasher = blake3()
    row_bytes = tensor.num_columns * itemsize
    portion = max(1, min(tensor.num_rows, CHUNK_BYTES // max(row_bytes, 1)))
    buffer = numpy.zeros((portion, row_bytes), numpy.uint8)
    for start in range(0, tensor.num_rows, portion):
        part = buffer[: min(portion, tensor.num_rows - start)]
        if not rows.is_zero:
            rows.fill(start, part)
        hasher.update(part.reshape(-1).data)
        if each is not None:
            each(start, part)
        progress(part.nbytes)
    return hasher.hexdigest()


def stored_hash(tensor: StoredTensor, files: SourceFiles, itemsize: int, *, progress: Progress = nothing) -> str:
    """Content hash of a tensor that lies in files."""
    return hash_rows(StoredRows(tensor, files, itemsize), tensor, itemsize, progress=progress)
