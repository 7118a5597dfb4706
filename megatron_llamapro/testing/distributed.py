"""Runs tests with several processes: gloo ranks from a fork server. The server has already loaded torch and
megatron.core, so a test costs half a second instead of twenty.

A worker is a module-level function. It runs on every rank, with the process group started and the CPU standing in for
CUDA. The ranks' return values come back as a list.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

TIMEOUT_SECONDS = 240


def run_distributed(worker: Callable, world_size: int, *args: object) -> list[Any]:
    """Run `worker(*args)` on `world_size` gloo ranks and return the list of their results. `args` must pickle.

    A rank that hangs dumps its stack and exits. A rank that raises fails the call with its traceback.
    """
    return _run(_in_world, world_size, worker, args)


def run_apart(worker: Callable, *args: object) -> Any:
    """Return `worker(*args)` from a separate process, with the CPU standing in for CUDA and no world started."""
    return _run(_call, 1, worker, args)[0]


def _run(runner: Callable, num_processes: int, worker: Callable, args: tuple) -> list[Any]:
    fork_server()
    with tempfile.TemporaryDirectory(prefix="llamapro-ranks-") as folder:
        processes = torch.multiprocessing.start_processes(
            _process_main,
            args=(num_processes, folder, runner, worker, args),
            nprocs=num_processes,
            join=False,
            start_method="forkserver",
        )
        while not processes.join():
            pass
        return [torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(num_processes)]


def fork_server() -> ForkServerContext:
    """Where processes start with torch and megatron.core loaded; the server itself starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    # A worker beside tests imports pytest with them. Our own comes last: it freezes what is loaded by then.
    beside_tests = ["pytest"] if "pytest" in sys.modules else []
    context.set_forkserver_preload([*beside_tests, "megatron_llamapro.testing.preload"])
    return context


def _process_main(rank: int, world_size: int, folder: str, runner: Callable, worker: Callable, args: tuple) -> None:
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    torch.set_num_threads(1)
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    runner(rank, world_size, Path(folder), worker, args)
    faulthandler.cancel_dump_traceback_later()


def _call(rank: int, world_size: int, folder: Path, worker: Callable, args: tuple) -> None:
    torch.save(worker(*args), folder / f"result-{rank}.pt")


def _in_world(rank: int, world_size: int, folder: Path, worker: Callable, args: tuple) -> None:
    from megatron_llamapro.runtime.distributed import stop_world

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS / 2),
    )
    _call(rank, world_size, folder, worker, args)
    torch.distributed.barrier()
    stop_world()
