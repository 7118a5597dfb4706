"""Writes a checkpoint's tensors on several threads. An interrupted conversion can resume.

Tensors are written in batches. Each batch is written, read back, compared by its hashes and noted in a journal. A
resumed run compares the noted tensors again, and rewrites those that a power cut has undone. Tensors are read back from
the page cache, so the disk moves each byte only once; `llamapro verify` proves that the disk kept them. (Reading,
writing and hashing release the GIL, so threads use all cores.)
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy

from megatron_llamapro.checkpoint.tensors.layout import StoredTensor, TargetFile
from megatron_llamapro.checkpoint.tensors.streaming import (
    Progress,
    Rows,
    allow_many_open_files,
    hash_rows,
    nothing,
    overlaps,
    read_exactly,
    stored_hash,
)
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import naming

BATCH_BYTES = 128 * 2**20


@dataclass(frozen=True)
class TensorJob:
    """A tensor to write."""

    name: str
    rows: Rows
    copies: tuple[StoredTensor, ...]
    """Where it goes in the target's files. A format may store more than one copy."""
    num_bytes: int


class Journal:
    """The tensors that a target already has.

    The file has a line `{"plan": fingerprint}`, then a line per batch, `{"hashes": {tensor: hash}}`.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """`fingerprint` identifies the conversion. A journal of another conversion is replaced by an empty one."""
        self._path, self._lock = path, threading.Lock()
        self.hashes: dict[str, str] = {}
        lines = self._whole_lines()
        if not lines or lines[0].get("plan") != fingerprint:
            lines = [{"plan": fingerprint}]
        for line in lines[1:]:
            self.hashes.update(line["hashes"])  # type: ignore[arg-type]
        draft = path.with_name(f"{path.name}.tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        draft.replace(path)

    @property
    def is_new(self) -> bool:
        """Whether no tensor is noted yet."""
        return not self.hashes

    def note(self, hashes: Mapping[str, str]) -> None:
        """Note that these tensors are written."""
        if not hashes:
            return
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"hashes": dict(hashes)}) + "\n")
            self.hashes.update(hashes)

    def _whole_lines(self) -> list[dict[str, object]]:
        """Return the lines before the first one that a kill or a power cut damaged."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        lines: list[dict[str, object]] = []
        for text_line in text.split("\n")[:-1]:
            try:
                line = json.loads(text_line)
            except ValueError:
                break
            if not isinstance(line, dict) or (lines and not isinstance(line.get("hashes"), dict)):
                break
            lines.append(line)
        return lines


class TargetFiles:
    """The files of a target. They are created in full size (zeros), filled by all threads and read back."""

    def __init__(self, files: Iterable[TargetFile]) -> None:
        self._open: dict[Path, int] = {}
        allow_many_open_files()
        try:
            for file in files:
                self._create(file)
        except BaseException:
            self.__exit__()
            raise

    def _create(self, file: TargetFile) -> None:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._open[file.path] = descriptor
        with naming(file.path):
            os.ftruncate(descriptor, file.num_bytes)
        for offset, data in file.fixed:
            self._write(descriptor, file.path, memoryview(data), offset)

    def __enter__(self) -> TargetFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def put(self, tensor: StoredTensor, start: int, rows: numpy.ndarray, itemsize: int) -> None:
        """Write a tensor's rows from `start`, uint8 [rows, bytes per row], into its pieces."""
        for piece, span, columns, offset in overlaps(tensor, start, len(rows), itemsize):
            part = numpy.ascontiguousarray(rows[span, columns])
            self._write(self._open[piece.file], piece.file, part.reshape(-1).data, offset)

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with a file's bytes from `offset`."""
        read_exactly(self._open[path], path, offset, out)

    def flush(self, tensor: StoredTensor, itemsize: int) -> None:
        """Ask the kernel to start writing a tensor to disk, so that little is left to sync at the end."""
        for piece in tensor.pieces:
            num_bytes = piece.num_elements * itemsize
            os.posix_fadvise(self._open[piece.file], piece.offset, num_bytes, os.POSIX_FADV_DONTNEED)

    @staticmethod
    def _write(descriptor: int, path: Path, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            with naming(path):
                done += os.pwrite(descriptor, data[done:], offset + done)


def are_complete(files: Iterable[TargetFile]) -> bool:
    """Return whether every file exists in its full size."""
    return all(file.path.is_file() and file.path.stat().st_size == file.num_bytes for file in files)


def transfer(
    jobs: Sequence[TensorJob],
    files: Sequence[TargetFile],
    journal: Journal,
    *,
    itemsize: int,
    num_workers: int,
    progress: Progress = nothing,
) -> int:
    """Write every tensor that the journal does not note, or that no longer has the noted hash.

    Afterwards the journal has the hash of every tensor. Returns the number of bytes that were already written.

    Raises:
        CheckpointError: a source changed while it was read, or a tensor was read back with other bytes.
        OSError: the disk is full, or fails.
    """
    with TargetFiles(files) as target:
        worker = _Transfer(target, journal, itemsize, progress)
        return sum(_run_all([partial(worker.write, batch) for batch in _batches(jobs)], num_workers))


def _batches(jobs: Iterable[TensorJob]) -> Iterator[list[TensorJob]]:
    """Yield consecutive jobs in batches of about `BATCH_BYTES`."""
    batch: list[TensorJob] = []
    held = 0
    for job in jobs:
        batch.append(job)
        held += job.num_bytes
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _Transfer:
    """Writes batches of tensors. All threads share one worker."""

    def __init__(self, target: TargetFiles, journal: Journal, itemsize: int, progress: Progress) -> None:
        self._target, self._journal = target, journal
        self._itemsize, self._progress = itemsize, progress

    def write(self, batch: Sequence[TensorJob]) -> int:
        """Write a batch. Return the number of its bytes that were already written."""
        todo = [job for job in batch if not self._is_done(job)]
        hashes = {job.name: self._write(job) for job in todo}
        for job in todo:
            for copy in job.copies:
                self._compare(job.name, copy, hashes[job.name])
                self._target.flush(copy, self._itemsize)
        self._journal.note(hashes)
        return sum(job.num_bytes for job in batch if job.name not in hashes)

    def _is_done(self, job: TensorJob) -> bool:
        noted = self._journal.hashes.get(job.name)
        if noted is None or any(stored_hash(copy, self._target, self._itemsize) != noted for copy in job.copies):
            return False
        self._progress(job.num_bytes)
        return True

    def _write(self, job: TensorJob) -> str:
        def put(start: int, rows: numpy.ndarray) -> None:
            for copy in job.copies:
                self._target.put(copy, start, rows, self._itemsize)

        each = None if job.rows.is_zero else put
        return hash_rows(job.rows, job.copies[0], self._itemsize, each=each, progress=self._progress)

    def _compare(self, name: str, copy: StoredTensor, expected: str) -> None:
        if stored_hash(copy, self._target, self._itemsize) != expected:
            raise CheckpointError(
                f"{copy.pieces[0].file}: {name} was read back with other bytes: check the machine, then try again"
            )


def _run_all(calls: Sequence[Callable[[], int]], num_workers: int) -> list[int]:
    """Run the calls on `num_workers` threads. The first error cancels calls that have not started, and is raised."""
    pool = ThreadPoolExecutor(max_workers=max(1, num_workers), thread_name_prefix="transfer")
    try:
        futures = [pool.submit(call) for call in calls]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        return [future.result() for future in done]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """Return two threads per core, so that one works while the other waits for the disk; at most eight."""
    return min(8, 2 * len(os.sched_getaffinity(0)))
