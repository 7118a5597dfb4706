"""A lock file in the folder that a run writes to, on any file system that its machines share. Needs no torch.

flock and fcntl are not used: on a cluster they depend on the mount options. Lustre without `-o flock` and NFS with
`nolock` refuse them or limit them to one node. NFSv3 keeps the locks of a dead node until the node is back. But on
every file system only one of several processes can create a file exclusively (O_EXCL), so that file is the lock. It
names its holder. A killed holder cannot remove it, so a living one touches it every few seconds:

1. On the holder's machine and in its pid namespace, the process is looked up. If it is dead, the lock is free at once.
2. Elsewhere (another node or container), the file's time is watched. If it changes, the holder is alive. If it stands
   still for `patience_seconds`, the holder is dead. Clocks are not compared, since they differ.
3. A holder that was frozen for that long, and finds another run's lock when it wakes up, ends at once.
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
    """A lock that is held during a `with` block. `what` names the locked place by its option.

    Raises:
        ConfigError: another run holds the lock.
        RunError: an earlier start of this job holds it: SLURM gave up its node, but the process has not ended yet.
        OSError: the file cannot be created.
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
        self._thread.join(self._beat_seconds)  # it may hang in a file system that does not answer
        with contextlib.suppress(OSError):
            if self._is_own():
                self.path.unlink()
            for folder in self._made:  # so that a refused run leaves nothing behind
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
        """Return when the holder is known to be dead. Raise if it is alive."""
        until, said = time.monotonic() + self._patience_seconds, False
        while time.monotonic() < until:
            seen = _look(self.path)
            if seen is None or (seen.holder and seen.holder.is_dead):
                return
            if seen != first or (seen.holder and seen.holder.is_alive):
                if seen.holder and seen.holder.is_of_this_job:
                    raise RunError(
                        f"{self._what} is still held by an earlier start of this job ({seen.holder}): try again when "
                        "that start has ended"
                    )
                raise ConfigError(
                    f"{self._what} is in use by another run ({seen.holder or 'it just started'}): wait until it ends, "
                    f"or choose another {self._what.split()[0]}"
                )
            if not said:
                said = True
                self._say(
                    f"{self._what} has the lock of another run ({seen.holder or self.path}): waiting "
                    f"{self._patience_seconds:.0f} s to see whether that run is alive"
                )
            time.sleep(min(1.0, self._beat_seconds / 2))

    def _take_over(self, dead: _Seen) -> bool:
        """Replace a dead holder's lock. Return whether this process did. Only one of several can: the file that becomes
        the new lock is first created under a name derived from the old lock."""
        claim = self.path.with_name(f".{self.path.name}.{hashlib.sha256(dead.text).hexdigest()[:12]}")
        if not self._create(claim):
            time.sleep(min(0.1, self._beat_seconds))
            if (other := _look(claim)) is not None:
                first = self._claims.setdefault(other.text, time.monotonic())
                if time.monotonic() - first > self._patience_seconds:  # its maker was killed in this function
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
            with contextlib.suppress(OSError):  # the file system may fail for a while; the run itself will notice
                self._renew()

    def _renew(self) -> None:
        seen = _look(self.path)
        if seen is None:  # removed by hand
            self._create(self.path)
        elif seen.text == self._text:
            os.utime(self.path)
        elif seen.holder is not None:
            print(
                f"error: {self._what} was taken over by {seen.holder}, because this process was frozen for more than "
                f"{self._patience_seconds:.0f} s: it ends now",
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
        """The holder that the file names. None if the file is still empty, or its content is invalid."""
        try:
            return Holder(**json.loads(self.text))
        except (ValueError, TypeError):
            return None


def _look(path: Path) -> _Seen | None:
    """Read the file's current state. Opening it makes NFS ask its server instead of its cache."""
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
    """Unique for each acquisition."""
    host: str
    pid: int
    pids_of: str
    """The machine's boot id and the pid namespace. `pid` is valid only within these."""
    start_ticks: int | None
    """When the process started, since pids are reused."""
    job: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _pids_of(), _start_ticks(pid), _job(), now)

    @property
    def is_of_this_job(self) -> bool:
        """Whether a scheduler started the holder and this process for the same job."""
        return bool(self.job) and self.job == _job()

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone. False if that cannot be seen."""
        return self._is_near and (not _exists(self.pid) or _start_ticks(self.pid) not in (None, self.start_ticks))

    @property
    def is_alive(self) -> bool:
        """Whether its process is known to run. False if that cannot be seen."""
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
    """Return this machine's boot id and pid namespace; empty if the system does not say."""
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
    """Return when a process of this machine started. -1: it has ended, but its parent has not reaped it. None: /proc
    does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
