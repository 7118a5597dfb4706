"""Tensors' rows out of files: any portion of them, a few megabytes at a time, and the hash of all.

Nothing here needs torch or as much memory as a tensor. Reading and hashing leave Python's lock.
"""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy
from blake3 import blake3

from megatron_llamapro.checkpoint.tensors.layout import Piece, StoredTensor
from megatron_llamapro.config.errors import CheckpointError

CHUNK_BYTES = 2**20  # fits a core's cache: read, hashed and written while it is there

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


FileState = tuple[int, int, int]
"""Which file a path names, its size and when it was last written."""


def state_of(path: Path) -> FileState:
    """The state of a file now.

    Raises:
        CheckpointError: it is not there.
    """
    try:
        return _state(path.stat())
    except OSError:
        raise CheckpointError(f"{path} vanished while it was being read") from None


def _state(status: os.stat_result) -> FileState:
    return status.st_ino, status.st_size, status.st_mtime_ns


def allow_many_open_files() -> None:
    """As many as the system lets this process have: the largest models have more files than the usual limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class SourceFiles:
    """Files that are read, opened once, and held against what they were when their headers were read."""

    def __init__(self, states: Mapping[Path, FileState] | None = None) -> None:
        allow_many_open_files()
        self._expected = dict(states or {})
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset` on.

        Raises:
            CheckpointError: the file is gone, shorter than it was, or another one.
        """
        read_exactly(self._descriptor(path), path, offset, out)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file is not what it was when its header was read."""
        for path, before in self._expected.items():
            if state_of(path) != before:
                raise _changed(path)

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
                if self._expected.setdefault(path, _state(status)) != _state(status):
                    os.close(descriptor)
                    raise _changed(path)
                self._open[path] = descriptor
            return self._open[path]


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} changed while it was being read: wait until it is complete, then try again")


def read_exactly(descriptor: int, path: Path, offset: int, out: memoryview) -> None:
    """Fill `out` from byte `offset` of an open file on, or raise `CheckpointError`."""
    done = 0
    while done < len(out):
        try:
            count = os.preadv(descriptor, [out[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path} is shorter than it was: it changed while it was being read")
        done += count


class Readable(Protocol):
    """Files whose bytes can be read by place."""

    def read(self, path: Path, offset: int, out: memoryview) -> None: ...


class StoredRows:
    """Rows of a tensor that lies in files."""

    is_zero = False

    def __init__(self, tensor: StoredTensor, files: Readable, itemsize: int) -> None:
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


def read_whole(tensor: StoredTensor, files: Readable, itemsize: int) -> numpy.ndarray:
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


def stored_hash(tensor: StoredTensor, files: Readable, itemsize: int, *, progress: Progress = nothing) -> str:
    """Content hash of a tensor that lies in files."""
    return hash_rows(StoredRows(tensor, files, itemsize), tensor, itemsize, progress=progress)
