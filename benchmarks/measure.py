"""Runs a program and measures it: wall time until its files are on the disk, and the peak of its anonymous memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLING_SECONDS = 0.05


@dataclass(frozen=True)
class Measurement:
    """One run of a program."""

    seconds: float
    """From its start until `sync` says that what it wrote is on the disk."""
    peak_anonymous_bytes: int
    """Of the program and its children together; pages of files do not count, shared memory does."""


class ProgramError(Exception):
    """A measured program ended with an error; the text is its last line."""


def run_measured(command: Sequence[str | Path], *, written: Path, log: Path) -> Measurement:
    """Run `command`, its output appended to `log`, and sync the file system that `written` is on.

    Raises:
        ProgramError: it exited with another code than 0.
    """
    with log.open("a+") as output:
        started = time.monotonic()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        with _Sampler(process.pid) as sampler:
            code = process.wait()
        if code == 0:
            subprocess.run(["sync", "--file-system", written], check=True)
        seconds = time.monotonic() - started
        if code != 0:
            raise ProgramError(f"exit code {code}: {_last_line(log)}")
    return Measurement(seconds, sampler.peak_bytes)


def copy_command(source: Path, target: Path) -> list[str | Path]:
    """A copy that moves every byte: no shared extents, no holes."""
    return ["cp", "--recursive", "--reflink=never", "--sparse=never", source, target]


def forget_files(folder: Path) -> None:
    """Have the kernel drop the folder's files from its page cache, so that the next program reads them from the disk.

    What is dirty stays, so the file system is synced first. Needs no privilege, and leaves all other files, programs
    and libraries above all, where they are.
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
    """Of all files in a folder."""
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
            processes = list(descendants(self._pid))
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes(processes, above=self.peak_bytes))
            if self._ended.wait(_SAMPLING_SECONDS):
                return


def descendants(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    for child in _children(pid):
        yield from descendants(child)


def _children(pid: int) -> list[int]:
    """Of all its threads; processes and threads may end while this reads, and then have none."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += [int(child) for child in (thread / "children").read_text().split()]
    return children


def _anonymous_bytes(pids: list[int], *, above: int) -> int:
    """Anonymous and shared memory of processes together.

    Pages that forked processes share are counted once, which takes the kernel a walk over all their pages: done only
    where the cheap sum, that counts them more than once, is `above` the peak so far.
    """
    quick = sum(_kilobytes(Path(f"/proc/{pid}/status"), "RssAnon:", "RssShmem:") for pid in pids) * 1024
    if len(pids) == 1 or quick <= above:
        return quick
    return sum(_kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon:", "Pss_Shmem:") for pid in pids) * 1024


def _kilobytes(path: Path, *fields: str) -> int:
    """Sum of lines such as "RssAnon:  12 kB"; 0 where the process is gone."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"
