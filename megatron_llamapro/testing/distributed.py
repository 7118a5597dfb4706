"""The one helper for tests with several processes: gloo ranks from a fork server that has torch and megatron.core
loaded already, so that a test costs half a second, not twenty.

A worker is a module-level function. It runs in every rank with the process group started and the CPU standing in for
CUDA; what the ranks return comes back as a list.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 240


def run_distributed(worker: Callable, world_size: int, *args: object) -> list[Any]:
    """`worker(*args)` on `world_size` gloo ranks; the list of what they return. `args` must pickle.

    A rank that hangs dumps its stack and ends; a rank that raises fails the call with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_llamapro.testing.preload"])
    with tempfile.TemporaryDirectory(prefix="llamapro-ranks-") as folder:
        processes = torch.multiprocessing.start_processes(
            _rank_main,
            args=(world_size, folder, worker, args),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        while not processes.join():
            pass
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, folder: str, worker: Callable, args: tuple) -> None:
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.distributed import stop_world
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    torch.distributed.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS / 2),
    )
    result = worker(*args)
    torch.save(result, Path(folder) / f"result-{rank}.pt")
    torch.distributed.barrier()
    stop_world()
    faulthandler.cancel_dump_traceback_later()
