"""A lock file that one run holds where it writes, on any file system that its machines share. Needs no torch.

flock and fcntl are not used: what they give on a cluster depends on how it is mounted. Lustre without `-o flock` and
NFS with `nolock` refuse them or keep them to one node; NFSv3 keeps those of a node that died until it is back. Every
file system gives a file that must not exist yet (O_EXCL) to one of several that make it, so that is the lock. Its
holder is named in it, and touches it every few seconds, since one that is killed cannot remove it:

1. On the holder's machine, in its pid namespace, its process is looked up: dead, and the lock is free at once.
2. Elsewhere (another node, another container) the file's time is watched. Clocks are not compared, since they differ: a
   time that moves has a living holder, and one that stands still for `patience_seconds` a dead one.
3. A holder that was frozen for that long, and finds another's lock when it wakes up, ends at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llamapro.config.command import TRY_AGAIN
from megatron_llamapro.config.errors import ConfigError, RunError

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0


class RunLock:
    """Held between `with` and its end. `what` is the place that it stands for, by its option's name.

    Raises:
        ConfigError: another run holds it.
        RunError: an earlier start of this job does, whose node SLURM gave up and which has not ended yet.
        OSError: the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        *,
        beat_seconds: float = BEAT_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        say: Callable[[str], object] = lambda text: print(text, flush=True),
    ) -> None:
        self.path, self._what, self._say = path, what, say
        self._beat_seconds, self._patience_seconds = beat_seconds, patience_seconds
        self._holder = Holder.this_process()
        self._text = json.dumps(asdict(self._holder)).encode() + b"\n"
        self._claims: dict[bytes, float] = {}
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock {path.name}", daemon=True)

    def __enter__(self) -> RunLock:
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create(self.path):
            if (seen := _look(self.path)) is not None:
                self._wait_for_a_sign(seen)
                if self._take_over(seen):
                    break
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(self._beat_seconds)  # it may be in a file system that does not answer
        with contextlib.suppress(OSError):
            if self._is_own():
                self.path.unlink()
            for folder in self._made:  # nothing is left of a run that was refused
                folder.rmdir()

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._text)
        except OSError:  # a full disk
            path.unlink()
            raise
        return True

    def _wait_for_a_sign(self, first: _Seen) -> None:
        """Return when the holder is known to be dead. Raise where it lives."""
        until, said = time.monotonic() + self._patience_seconds, False
        while time.monotonic() < until:
            seen = _look(self.path)
            if seen is None or (seen.holder and seen.holder.is_dead):
                return
            if seen != first or (seen.holder and seen.holder.is_alive):
                if seen.holder and seen.holder.is_of_this_job:
                    raise RunError(
                        f"{self._what} is still held by an earlier start of this job ({seen.holder}): try again when "
                        "that has ended"
                    )
                raise ConfigError(
                    f"{self._what} is in use by another run ({seen.holder or 'it just began'}): wait for its end, or "
                    f"choose another {self._what.split()[0]}"
                )
            if not said:
                said = True
                self._say(
                    f"{self._what} has the lock of another run ({seen.holder or self.path}): waiting "
                    f"{self._patience_seconds:.0f} s to see whether that is alive"
                )
            time.sleep(min(1.0, self._beat_seconds / 2))

    def _take_over(self, dead: _Seen) -> bool:
        """Replace a dead holder's lock, which only one of several that try does: the file that becomes the new lock is
        made under a name that belongs to the old one."""
        claim = self.path.with_name(f".{self.path.name}.{hashlib.sha256(dead.text).hexdigest()[:12]}")
        if not self._create(claim):
            time.sleep(min(0.1, self._beat_seconds))
            if (other := _look(claim)) is not None:
                first = self._claims.setdefault(other.text, time.monotonic())
                if time.monotonic() - first > self._patience_seconds:  # killed between these lines
                    claim.unlink(missing_ok=True)
            return False
        seen = _look(self.path)
        if seen is None or seen.text != dead.text:  # it has been replaced already
            claim.unlink()
            return False
        claim.replace(self.path)
        return True

    def _is_own(self) -> bool:
        seen = _look(self.path)
        return seen is not None and seen.text == self._text

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            with contextlib.suppress(OSError):  # a file system that fails for a while; the run itself will notice
                self._renew()

    def _renew(self) -> None:
        seen = _look(self.path)
        if seen is None:  # removed by hand
            self._create(self.path)
        elif seen.text == self._text:
            os.utime(self.path)
        elif seen.holder is not None:
            print(
                f"error: {self._what} was taken over by {seen.holder}, since this process stood still for more than "
                f"{self._patience_seconds:.0f} s: it ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(TRY_AGAIN)


@dataclass(frozen=True)
class _Seen:
    """A lock file at one moment."""

    text: bytes
    time_ns: int

    @property
    def holder(self) -> Holder | None:
        """None where the file says nothing yet, or what is in it is nobody's."""
        try:
            return Holder(**json.loads(self.text))
        except (ValueError, TypeError):
            return None


def _look(path: Path) -> _Seen | None:
    """The file as it is now. It is opened for that: NFS asks its server then, and not its cache."""
    try:
        with path.open("rb") as file:
            return _Seen(file.read(4096), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


@dataclass(frozen=True)
class Holder:
    """The process that a lock belongs to."""

    token: str
    """Of one acquisition."""
    host: str
    pid: int
    pids_of: str
    """Boot of the machine and pid namespace, in which `pid` means something."""
    start_ticks: int | None
    """When the process started: pids are used again."""
    job: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _pids_of(), _start_ticks(pid), _job(), now)

    @property
    def is_of_this_job(self) -> bool:
        """Whether a scheduler started it and this process for the same job."""
        return bool(self.job) and self.job == _job()

    @property
    def is_dead(self) -> bool:
        """Whether its process is seen to be gone. False where it cannot be seen."""
        return self._is_near and (not _exists(self.pid) or _start_ticks(self.pid) not in (None, self.start_ticks))

    @property
    def is_alive(self) -> bool:
        """Whether its process is seen to run. False where it cannot be seen."""
        return self._is_near and _start_ticks(self.pid) == self.start_ticks

    @property
    def _is_near(self) -> bool:
        return bool(self.pids_of) and self.pids_of == _pids_of()

    def __str__(self) -> str:
        job = f", {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _job() -> str:
    return next((f"{name}={os.environ[name]}" for name in _JOB_VARIABLES if os.environ.get(name)), "")


def _pids_of() -> str:
    """Empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine started. -1: it has ended, unnoticed by its parent. None: /proc hides it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
