"""Ends a run that hangs, and says which rank it was.

Every rank beats when it gets on. When it has not for too long, a thread of it puts the stack of its main thread where
all ranks can read it, and waits a moment for the others'. Whoever then has put none is frozen, and whoever is not
inside a collective is what the others wait for. A timer that needs no Python comes after that, for a rank whose threads
are stuck.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_llamapro.config.command import HUNG, tell_torchrun

_GRACE_SECONDS = 5.0
_KEY = "llamapro/hang"

# A rank whose stack has one of these waits for the others, or for work that it has queued.
_WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py", "torch/cuda/__init__.py")


Stack = Sequence[tuple[str, str]]
"""(file, function), the innermost last."""


class Watchdog:
    """Watches one rank. All ranks start one, once their process group is there."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds, self.rank, self.world_size = timeout_seconds, dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store().clone()  # one of its own: the other may be waiting
        self._main = threading.main_thread().ident
        self._last = float("inf")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """This rank got on."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout_seconds + 4 * _GRACE_SECONDS, exit=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take any time."""
        self.stop()
        yield
        self.beat()

    def stop(self) -> None:
        """No longer watch, until the next `beat`."""
        self._last = float("inf")
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while time.monotonic() - self._last < self.timeout_seconds:
            time.sleep(min(1.0, self.timeout_seconds / 4))
        stack = traceback.extract_stack(sys._current_frames().get(self._main or 0))
        text = "".join(traceback.format_list(stack))
        _say(f"rank {self.rank}: no step for {self.timeout_seconds:g} s; it is at\n{text}")
        try:
            said = self._verdict(stack)
            _say(said)
            tell_torchrun(said)
            self._wait_for_readers()
        finally:
            os._exit(HUNG)

    def _verdict(self, stack: traceback.StackSummary) -> str:
        self._store.set_timeout(timedelta(seconds=_GRACE_SECONDS))
        try:
            self._store.set(f"{_KEY}/{self.rank}", json.dumps([[frame.filename, frame.name] for frame in stack]))
        except RuntimeError:
            return "hang: the ranks' common store does not answer: rank 0, which has it, is frozen or gone"
        return verdict({rank: json.loads(text) for rank, text in self._gather(_KEY).items()}, self.world_size)

    def _wait_for_readers(self) -> None:
        """Until all have said what they found: the end of rank 0 takes the store away from those that still read."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{_KEY}/said/{self.rank}", "")
            self._gather(f"{_KEY}/said")

    def _gather(self, key: str) -> dict[int, bytes]:
        """What the ranks have put under a key; not there is who puts nothing in the time of grace."""
        found, until = {}, time.monotonic() + _GRACE_SECONDS
        for rank in range(self.world_size):
            with contextlib.suppress(RuntimeError):
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=max(0.1, until - time.monotonic())))
                found[rank] = self._store.get(f"{key}/{rank}")
        return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verdict(stacks: Mapping[int, Stack], world_size: int) -> str:
    """One line: which rank the others wait for."""
    silent = [rank for rank in range(world_size) if rank not in stacks]
    if silent:
        return f"hang: {_ranks(silent)} gave no sign of life: frozen or gone"
    busy = {rank: stack[-1] for rank, stack in stacks.items() if not _waits(stack)}
    if len(busy) == world_size:  # on a GPU a rank also waits where it reads a result
        usual, _ = Counter(map(tuple, busy.values())).most_common(1)[0]
        busy = {rank: place for rank, place in busy.items() if tuple(place) != usual}
    if not busy:
        return "hang: all ranks wait at the same kind of place: compare the stacks above"
    places = ", ".join(f"rank {rank} is in {name} ({file})" for rank, (file, name) in sorted(busy.items()))
    return f"hang: the others wait for {_ranks(sorted(busy))}: {places}"


def _waits(stack: Stack) -> bool:
    return any(part in file for file, _ in stack for part in _WAITING)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
