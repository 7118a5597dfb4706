"""Process groups: torch's world, and megatron.core's tensor-, pipeline- and data-parallel groups in it.

Everything else takes ranks from a `ParallelLayout`. `model/build.py` alone asks `megatron.core.parallel_state` for its
stage, and `dry_run/fake_world.py` removes the groups of its fake world.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_llamapro.config.command import TRY_AGAIN, end_at_once
from megatron_llamapro.config.errors import SHORT_WRITE, CheckpointError, LlamaProError, RunError
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.runtime.launched import check_device, world_of_environment

Found = TypeVar("Found")


@dataclass(frozen=True)
class ParallelLayout:
    """This rank's place in the world."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_pipeline_size: int | None
    data_rank: int
    data_size: int

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def start_world(*, timeout_minutes: float = 10.0) -> None:
    """Start torch's default process group from torchrun's environment. Without that, start a world of one process.

    Uses NCCL if there is a CUDA device, else gloo. If the ranks do not find one another in time, the process ends.

    Raises:
        ConfigError: the environment's variables are invalid, or this node has no GPU for this rank.
        RunError: the ranks did not find one another.
    """
    if dist.is_initialized():
        return
    launched = world_of_environment(os.environ)
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        check_device(local_rank, num_devices=torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if launched is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    failed = (
        f"the ranks did not find one another in {timeout_minutes:g} minutes (parallel.distributed_timeout_minutes): "
        f"this is {launched}: check that all of them are started, and that this node can reach that address"
    )
    # torch applies the timeout to each of several steps, tries again, and then prints a page. This timer fires first.
    seconds = timeout.total_seconds()
    deadline = threading.Timer(max(seconds - 1, seconds / 2), lambda: end_at_once(TRY_AGAIN, f"error: {failed}"))
    deadline.daemon = True
    deadline.start()
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(f"{failed} ({reason(error)})") from None
    finally:
        deadline.cancel()


def start_model_parallel(parallel: ParallelConfig, *, seed: int) -> ParallelLayout:
    """Create megatron.core's process groups and seed its random states. A second call replaces the first one's."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_size=parallel.virtual_pipeline_model_parallel_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def process_groups():
    """Return this rank's `ProcessGroupCollection`, for megatron.core's schedules."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def stop_world() -> None:
    """Destroy all process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first_rank(value: Found) -> Found:
    """Return rank 0's `value` on all ranks. All ranks call it. Use it for anything read from disk: ranks may see
    different files, take different branches, and hang in different collectives."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def ask_first_rank(find: Callable[[], Found]) -> Found:
    """What `find` returns on the first rank, which alone calls it. All ranks call this; what is found must pickle.

    Raises:
        LlamaProError: on all ranks, where `find` raised it.
    """
    found, error = None, None
    if dist.get_rank() == 0:
        try:
            found = find()
        except LlamaProError as raised:
            error = raised
    found, error = from_first_rank((found, error))
    if error is not None:
        raise for_all_ranks(error)
    return found  # type: ignore[return-value]


def on_any_rank(flag: bool) -> bool:
    """Whether any rank sets `flag`. All ranks call it."""
    flags = torch.tensor([float(flag)], device=torch.cuda.current_device())
    dist.all_reduce(flags)
    return bool(flags.item())


def for_all_ranks(error: LlamaProError) -> LlamaProError:
    """Return `error`, marked as raised by every rank."""
    error.on_all_ranks = True
    return error


def raise_together(error: LlamaProError | None) -> None:
    """Raise an error on all ranks if any rank has one. Every rank calls it with its own error, or None.

    The error raised is that of the lowest rank that has one. An error on one rank alone would leave the others waiting
    in their next collective.
    """
    errors: list[LlamaProError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, found in enumerate(errors):
        if found is not None:
            where = f" (on rank {rank})" if rank else ""
            raise for_all_ranks(type(found)(f"{found}{where}"))


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Run a block on every rank. At its end all ranks raise an error if any rank has one, as in `raise_together`.

    The block may contain a collective only if no rank can fail before or in it.

    Raises:
        LlamaProError: the block raised it. Any other exception becomes a `CheckpointError` with `what` and the reason.
    """
    error: LlamaProError | None = None
    try:
        yield
    except LlamaProError as found:
        error = found
    except Exception as found:
        error = CheckpointError(f"{what}: {reason(found)}")
    raise_together(error)


def reason(error: BaseException) -> str:
    """Return the one line of an exception that matters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if isinstance(error, RuntimeError) and "unexpected pos" in str(error):  # torch.save's words
        return SHORT_WRITE
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:300]}" if lines else type(error).__name__
