"""Reads and hashes tensors in files, a few megabytes of rows at a time.

Nothing needs torch, and only `read_whole` holds a whole tensor. Reading and hashing release the GIL.
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

CHUNK_BYTES = 2**20  # fits a core's cache, so that a chunk is read, hashed and written from there

Progress = Callable[[int], object]
"""Called with the number of bytes that were just processed."""


def nothing(num_bytes: int) -> None:
    """Ignore progress."""


class Rows(Protocol):
    """A tensor whose rows can be read in any portion."""

    is_zero: bool
    """Whether every byte is 0, so that none needs to be read or written."""

    def fill(self, start: int, out: numpy.ndarray) -> None:
        """Copy the rows from `start` into `out`, uint8 [rows, bytes per row]."""
        ...


FileState = tuple[int, int, int]
"""A file's inode number, its size in bytes and the time of its last write in nanoseconds."""


def state_of(path: Path) -> FileState:
    """Return the current state of a file.

    Raises:
        CheckpointError: the file does not exist.
    """
    try:
        return _state(path.stat())
    except OSError:
        raise CheckpointError(f"{path} vanished while it was being read") from None


def _state(status: os.stat_result) -> FileState:
    return status.st_ino, status.st_size, status.st_mtime_ns


def allow_many_open_files() -> None:
    """Raise this process's limit of open files to its maximum. The largest models exceed the usual limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class SourceFiles:
    """Files to read. Each is opened once, and must not have changed since its header was read."""

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
        """Fill `out` with the file's bytes from `offset`.

        Raises:
            CheckpointError: the file is gone, shorter than before, or another file.
        """
        read_exactly(self._descriptor(path), path, offset, out)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file has changed since its header was read."""
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
    """Fill `out` with an open file's bytes from `offset`, or raise `CheckpointError`."""
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
    """Files whose bytes can be read at any offset."""

    def read(self, path: Path, offset: int, out: memoryview) -> None: ...


class StoredRows:
    """Rows of a tensor that is stored in files."""

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
    """Yield the pieces that hold any of the `num_rows` rows from `start`, each as a tuple of:

    1. the piece,
    2. its rows in a buffer of just these rows, uint8 [rows, bytes per row],
    3. its byte columns in that buffer,
    4. the byte in its file where its first such row starts.
    """
    for piece in tensor.pieces:
        first, last = max(start, piece.rows[0]), min(start + num_rows, piece.rows[1])
        if first < last:
            columns = slice(piece.columns[0] * itemsize, piece.columns[1] * itemsize)
            offset = piece.offset + (first - piece.rows[0]) * piece.num_columns * itemsize
            yield piece, slice(first - start, last - start), columns, offset


def read_whole(tensor: StoredTensor, files: Readable, itemsize: int) -> numpy.ndarray:
    """Return a whole tensor, uint8 [rows, bytes per row]."""
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
    """Return the content hash (BLAKE3) of a tensor's row-major bytes. Shape and type are not part of it.

    `each` is called with every portion of rows: the index of the first row, then the rows.
    """
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
    """Return the content hash of a tensor that is stored in files."""
    return hash_rows(StoredRows(tensor, files, itemsize), tensor, itemsize, progress=progress)


def combined_hash(hashes: Mapping[str, str]) -> str:
    """Return one hash of many tensors' hashes: BLAKE3 of a line `name hash` for each, sorted by name."""
    return blake3("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()
