"""Signals that ask a run to save and end. Needs neither torch nor megatron, so that it can listen before their import.

| signal | before the first step | during training |
|---|---|---|
| SIGTERM, SIGHUP (the terminal was closed) | ends at once: nothing is lost | saves after the step and ends |
| SIGINT (Ctrl-C) | ends at once | the first saves after the step and ends, a second ends at once |
| SIGUSR1 (SLURM takes the nodes soon) | is remembered: saves after one step and ends | saves after the step and ends |

A thread receives the signals too. It can end the run at once while the main thread waits in C++ for another rank, where
Python runs no handlers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType

from megatron_llamapro.config.command import INTERRUPTED, end_at_once, is_first_of_node, started_by_torchrun

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""nohup and a shell's & start a program with these ignored, and it must keep ignoring them. Below torchrun they are
handled: torchrun receives them all the same and passes them on."""

_SAME_KEY_SECONDS = 0.5
"""One Ctrl-C may arrive twice within this time: from the terminal, and passed on by a launcher."""


_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


class StopRequest:
    """A request that a signal sets and the loop polls. `kept` describes, for messages, the saved part of the run."""

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        """Whether Ctrl-C requested it."""
        self.kept: Callable[[], str] = lambda: "nothing was trained yet"
        self._training = self._saves = self._closed = False
        self._num_interrupts, self._interrupted_at = 0, -_SAME_KEY_SECONDS
        self._process = os.getpid()
        self._listen()
        for number in STOP_SIGNALS:
            if number in _MAY_BE_IGNORED and signal.getsignal(number) is signal.SIG_IGN and not started_by_torchrun():
                continue
            signal.signal(number, self._note)

    def begin(self, *, saves: bool) -> None:
        """Note that training starts: from now on there are steps to lose. `saves` says whether a stop saves them."""
        self._training, self._saves = True, saves

    def close(self) -> None:
        """Ignore signals because the run is over. A late signal must not kill the ending process and change its exit
        code. (Python then restores the default action of other handlers; Ctrl-C keeps its own.)"""
        self._closed = True
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Make the current step the last one. Runs in the main thread, as soon as that runs Python. Processes forked
        from this one inherit the handler and continue their work."""
        if os.getpid() == self._process:
            self.requested = True
            self.interrupted = self.interrupted or signum == signal.SIGINT

    def _listen(self) -> None:
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours
        threading.Thread(target=self._hear_all, args=(ear,), name="stop signals", daemon=True).start()

    def _hear_all(self, ear: int) -> None:
        while heard := os.read(ear, 64):
            for number in heard:
                if number in STOP_SIGNALS:  # Python reports every signal that has a handler, e.g. SIGCHLD
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if self._closed:
            return
        if not self._training and number != signal.SIGUSR1:
            how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
            end_at_once(128 + number, f"error: {how} before the first step; {self.kept()}")
        self.requested = True
        if number == signal.SIGINT:
            self._interrupt()
        elif self._num_interrupts and number == signal.SIGTERM:  # torchrun passes on a second Ctrl-C as SIGTERM
            self._abort()

    def _interrupt(self) -> None:
        now = time.monotonic()
        since, self._interrupted_at = now - self._interrupted_at, now
        if since < _SAME_KEY_SECONDS:
            return
        self._num_interrupts += 1
        if self._num_interrupts > 1:
            self._abort()
        if is_first_of_node():
            what = "is saved, then the run stops" if self._saves else "is the last, and nothing is saved"
            say = f"interrupted: the current step {what}; Ctrl-C again stops at once\n"
            with contextlib.suppress(OSError):
                os.write(2, say.encode())

    def _abort(self) -> None:
        end_at_once(INTERRUPTED, f"error: interrupted at once, unsaved steps are lost; {self.kept()}")


@contextlib.contextmanager
def children_deaf(signals: Collection[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Start processes in this block that never receive `signals`: their parent ends them. (A terminal, a scheduler and
    torchrun send them to every process of a run.) This process receives them at the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, whose main thread forked it, ends in any way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
