"""A request to save and end, by signal. Needs neither torch nor megatron, so that it can be there before them.

| signal | before the first step | while it trains |
|---|---|---|
| SIGTERM, SIGHUP (the terminal was closed) | ends at once: nothing is lost | saves after the step and ends |
| SIGINT (Ctrl-C) | ends at once | the first saves after the step and ends, a second ends at once |
| SIGUSR1 (SLURM: the nodes are taken away soon) | is remembered: after one step, as beside | saves after it and ends |

A thread hears signals too, so that one that ends the run at once does so while the main thread waits in C++ for another
rank, where Python runs no handlers.
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
"""nohup and a shell's & start a program with these ignored, and it is to keep that. torchrun hears them all the same
and passes them on, so below it they count."""

_SAME_KEY_SECONDS = 0.5
"""A Ctrl-C may come twice: from the terminal, and from a launcher that passes on its own."""


_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


class StopRequest:
    """Set by a signal; the loop asks for it. `kept` says, for a message, what of the run is on the disk."""

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        """Whether it was by Ctrl-C."""
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
        """From here on there are steps to lose. `saves`: a stop saves them."""
        self._training, self._saves = True, saves

    def close(self) -> None:
        """The run is over: a signal that still comes is not to kill the process while it ends, after which its exit
        code would be another. (Python gives other handlers their default meaning then; Ctrl-C keeps its own.)"""
        self._closed = True
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as it runs Python: the step that it is in is the last one. Processes forked from
        this one have this handler too, and go on with their work."""
        if os.getpid() == self._process:
            self.requested = True
            self.interrupted = self.interrupted or signum == signal.SIGINT

    def _listen(self) -> None:
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # theirs are not ours
        threading.Thread(target=self._hear_all, args=(ear,), name="stop signals", daemon=True).start()

    def _hear_all(self, ear: int) -> None:
        while heard := os.read(ear, 64):
            for number in heard:
                if number in STOP_SIGNALS:  # Python tells of all that have a handler, e.g. SIGCHLD
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
        elif self._num_interrupts and number == signal.SIGTERM:  # torchrun's way to pass on a second Ctrl-C
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
            say = f"interrupted: the step that runs now {what}; Ctrl-C again stops at once\n"
            with contextlib.suppress(OSError):
                os.write(2, say.encode())

    def _abort(self) -> None:
        end_at_once(INTERRUPTED, f"error: interrupted at once, what was not saved is lost; {self.kept()}")


@contextlib.contextmanager
def children_deaf(signals: Collection[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Processes that are started in the block never hear these: it is their parent that ends them. A terminal, a
    scheduler, and torchrun send them to every process of the run. Here they wait for the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process with `parent`, whose main thread has forked it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
