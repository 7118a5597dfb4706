"""A run that hangs ends and names the rank that hung: real processes, one of which sleeps or is frozen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.config.command import HUNG
from megatron_llamapro.runtime.watchdog import verdict

WORKER = """
import os, signal, sys, time
import torch, torch.distributed as dist
from megatron_llamapro.runtime.watchdog import Watchdog

def stuck():
    if sys.argv[1] == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=3)
watchdog = Watchdog(2.0)
with watchdog.paused():
    time.sleep(3)
for step in range(2):
    watchdog.beat()
    dist.all_reduce(torch.ones(1))
print("got on", flush=True)
if rank == 1:
    stuck()
dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("asleep", "hang: the others wait for rank 1: rank 1 is in stuck (<string>)"),
        ("frozen", "hang: rank 1 gave no sign of life: frozen or gone"),
    ],
)
def test_the_rank_that_hangs_is_named(how: str, line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, how, str(tmp_path / "rendezvous")]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    try:
        for rank in (0, 2) if how == "frozen" else (0, 1, 2):
            out, errors = ranks[rank].communicate(timeout=90)
            assert ranks[rank].returncode == HUNG and out == "got on\n", errors
            assert line in errors.splitlines() and f"rank {rank}: no step for 2 s; it is at" in errors
            assert ("in stuck" if rank == 1 else "in all_reduce") in errors
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


SLOW_READER = """
import os, sys, time
import torch, torch.distributed as dist
from megatron_llamapro.runtime.watchdog import Watchdog

class Slow:
    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def get(self, key):
        time.sleep(0.5)
        return self.store.get(key)

def stuck():
    time.sleep(100)

rank = int(os.environ["RANK"])
store = dist.FileStore(sys.argv[1], 3)
if rank == 0:
    server = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    store.set("port", str(server.port))
else:
    server = dist.TCPStore("127.0.0.1", int(store.get("port")), 3, wait_for_workers=False)
dist.init_process_group("gloo", store=server, rank=rank, world_size=3)
watchdog = Watchdog(1.0)
if rank == 2:
    watchdog._store = Slow(watchdog._store)
dist.all_reduce(torch.ones(1))
watchdog.beat()
if rank == 1:
    stuck()
dist.all_reduce(torch.ones(1))
"""


def test_a_rank_that_reads_slowly_gives_the_same_report(tmp_path: Path) -> None:
    """Rank 0 hosts the common store, as on a cluster. It must not end while others still read the stacks from it."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_READER, str(tmp_path / "port")],
            env={**os.environ, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=90)
            assert process.returncode, errors  # not always HUNG: the end of the first is an error for the others
            assert "hang: the others wait for rank 1: rank 1 is in stuck (<string>)" in errors.splitlines(), errors
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


LOOP, DATA = ("training/loop.py", "train"), ("data/dataset.py", "read")
COLLECTIVE = ("lib/torch/distributed/distributed_c10d.py", "all_reduce")


def test_verdicts_name_the_rank_that_others_wait_for() -> None:
    waits, works = [LOOP, COLLECTIVE], [LOOP, DATA]
    assert "wait for rank 2: rank 2 is in read" in verdict({0: waits, 1: waits, 2: works}, 3)
    assert "ranks 1, 2 gave no sign" in verdict({0: waits}, 3)
    assert "compare the stacks" in verdict({0: waits, 1: waits}, 2)
    reads_result = [LOOP, ("training/step.py", "reduce_loss")]
    assert "wait for rank 1: rank 1 is in read (data/dataset.py)" in verdict(
        {0: reads_result, 1: works, 2: reads_result}, 3
    )
    assert "compare the stacks" in verdict({0: reads_result, 1: reads_result}, 2)
