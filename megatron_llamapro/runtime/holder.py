"""Which process holds something, for other processes to read: on this machine it can be looked up. Needs no torch."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

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
