"""Ends a run that hangs, and says which rank caused it.

Every rank beats when it makes progress. If it has not beaten for too long, a watchdog thread publishes the stack of its
main thread to all ranks, and waits a moment for the others' stacks. Ranks that report no stack are frozen or gone. The
others wait for any rank that is not inside a collective. If a rank's threads are stuck, a timer that needs no Python
ends it a little later.
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

# A rank with one of these in its stack waits for other ranks, or for work that it has queued.
_WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py", "torch/cuda/__init__.py")


Stack = Sequence[tuple[str, str]]
"""(file, function) pairs, innermost last."""


class Watchdog:
    """Watches one rank. Every rank starts one after its process group exists."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds, self.rank, self.world_size = timeout_seconds, dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store().clone()  # the default one may be busy waiting
        self._main = threading.main_thread().ident
        self._last = float("inf")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Note that this rank made progress."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout_seconds + 4 * _GRACE_SECONDS, exit=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch during this block, which may take any time."""
        self.stop()
        yield
        self.beat()

    def stop(self) -> None:
        """Stop watching until the next `beat`."""
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
            return "hang: the ranks' common store does not answer: rank 0, which holds it, is frozen or gone"
        return verdict({rank: json.loads(text) for rank, text in self._gather(_KEY).items()}, self.world_size)

    def _wait_for_readers(self) -> None:
        """Wait until all ranks have printed their verdict: when rank 0 ends, the store ends with it."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{_KEY}/said/{self.rank}", "")
            self._gather(f"{_KEY}/said")

    def _gather(self, key: str) -> dict[int, bytes]:
        """Return what each rank has stored under a key. A rank that stores nothing in time is left out."""
        found, until = {}, time.monotonic() + _GRACE_SECONDS
        for rank in range(self.world_size):
            with contextlib.suppress(RuntimeError):
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=max(0.1, until - time.monotonic())))
                found[rank] = self._store.get(f"{key}/{rank}")
        return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verdict(stacks: Mapping[int, Stack], world_size: int) -> str:
    """Say in one line which rank the others wait for."""
    silent = [rank for rank in range(world_size) if rank not in stacks]
    if silent:
        return f"hang: {_ranks(silent)} gave no sign of life: frozen or gone"
    busy = {rank: stack[-1] for rank, stack in stacks.items() if not _waits(stack)}
    if len(busy) == world_size:  # on a GPU a rank also waits when it reads a result
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
