"""Runs a program and measures it: wall time until its files are on the disk, the peak of its anonymous memory, and the
bytes that the disk moved for it."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLING_SECONDS = 0.05
_BLOCK_BYTES = 512  # the kernel's unit in getrusage(2)


@dataclass(frozen=True)
class Measurement:
    """One run of a program."""

    seconds: float
    """From its start until `sync` reports its files on the disk."""
    peak_anonymous_bytes: int
    """Of the program and its children together. Shared memory counts; pages of files do not."""
    disk_read_bytes: int
    """Bytes that were not in the page cache. Exact, unlike times on a shared disk."""
    disk_write_bytes: int
    """Bytes that reached the disk. Holes do not count, nor files that were deleted before they were synced."""


class ProgramError(Exception):
    """A measured program ended with an error. The text is its last line of output."""


def run_measured(command: Sequence[str | Path], *, written: Path, log: Path) -> Measurement:
    """Run `command`, append its output to `log`, and sync the file system of `written`.

    Raises:
        ProgramError: the exit code is not 0.
    """
    with log.open("a+") as output:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.monotonic()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        with _Sampler(process.pid) as sampler:
            code = process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if code == 0:
            subprocess.run(["sync", "--file-system", written], check=True)
        seconds = time.monotonic() - started
        if code != 0:
            raise ProgramError(f"exit code {code}: {_last_line(log)}")
    return Measurement(
        seconds,
        sampler.peak_bytes,
        disk_read_bytes=_BLOCK_BYTES * (after.ru_inblock - before.ru_inblock),
        disk_write_bytes=_BLOCK_BYTES * (after.ru_oublock - before.ru_oublock),
    )


def copy_command(source: Path, target: Path) -> list[str | Path]:
    """Return a copy command that moves every byte: no shared extents, no holes."""
    return ["cp", "--recursive", "--reflink=never", "--sparse=never", source, target]


def forget_files(folder: Path) -> None:
    """Drop the folder's files from the kernel's page cache, so that the next program reads them from the disk.

    Dirty pages would stay, so the file system is synced first. This needs no privilege, and it keeps all other files
    in the cache, above all programs and libraries.
    """
    subprocess.run(["sync", "--file-system", folder], check=True)
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Sampler(threading.Thread):
    """Watches the memory of a process tree while the `with` block runs."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid = pid
        self._ended = threading.Event()

    def __enter__(self) -> _Sampler:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while True:
            found = _anonymous_bytes(descendants(self._pid), above=self.peak_bytes)
            self.peak_bytes = max(self.peak_bytes, found)
            if self._ended.wait(_SAMPLING_SECONDS):
                return


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants that still run."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def _anonymous_bytes(pids: list[int], *, above: int) -> int:
    """Return the anonymous and shared memory of all processes together.

    Pages that forked processes share count once. The kernel has to walk over all pages for that, so it is done only if
    the cheap sum, which counts shared pages several times, is `above` the peak so far.
    """
    quick = sum(_kilobytes(Path(f"/proc/{pid}/status"), "RssAnon:", "RssShmem:") for pid in pids) * 1024
    if len(pids) == 1 or quick <= above:
        return quick
    return sum(_kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon:", "Pss_Shmem:") for pid in pids) * 1024


def _kilobytes(path: Path, *fields: str) -> int:
    """Return the sum of lines such as "RssAnon:  12 kB", or 0 if the process has ended."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"
