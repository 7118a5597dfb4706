"""A request to save and end, by signal. Needs neither torch nor megatron, so that it can be there before them."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""A scheduler's, or Ctrl-C's twin; and the one that SLURM sends some time before it takes the nodes away."""


class StopRequest:
    """Set by either signal: the run saves after the step and ends. Later ones change nothing."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def close(self) -> None:
        """The run is over: a signal that still comes is not to kill the process while it ends (Python gives it back its
        default meaning then)."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
