"""Process groups: torch's world, and megatron.core's tensor-, pipeline- and data-parallel groups in it.

The only module that reads `megatron.core.parallel_state`.
"""

from __future__ import annotations

import datetime
import importlib
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llamapro.config.errors import LlamaProError
from megatron_llamapro.config.schema import ParallelConfig

# What this package imports of megatron.core, and what warns when it is imported.
_MEGATRON_MODULES = (
    "megatron.core",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)

# What megatron.core 0.16.1 makes newer versions of torch warn of. Start of the message, category.
UPSTREAM_WARNINGS = (
    (r"`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    (r"The .grad attribute of a Tensor that is not a leaf", UserWarning),  # its optimizer asks views of parameters
    (r"`load_state_dict` is deprecated", FutureWarning),  # its checkpoint loader
    (r"torch.distributed.(_all_gather_base|_reduce_scatter_base) is a private function", FutureWarning),
)


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
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def start_world(*, timeout_minutes: float = 10.0) -> None:
    """Start torch's default process group from torchrun's environment, or a world of one without it.

    NCCL where there is a CUDA device, else gloo.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    rendezvous = Path(tempfile.mkdtemp(prefix="llamapro-")) / "rendezvous"
    dist.init_process_group(backend, init_method=rendezvous.as_uri(), rank=0, world_size=1, timeout=timeout)


def start_model_parallel(parallel: ParallelConfig, *, seed: int) -> ParallelLayout:
    """Lay megatron.core's process groups over the world and seed its random states. Idempotent per process."""
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


def stop_world() -> None:
    """Take down all process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size_from_environment() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def raise_together(error: LlamaProError | None) -> None:
    """Every rank calls this with its own error, or None. If any has one, all raise the first rank's.

    An error on one rank alone would leave the others waiting in their next collective.
    """
    errors: list[LlamaProError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, found in enumerate(errors):
        if found is not None:
            where = f" (on rank {rank})" if rank else ""
            raise type(found)(f"{found}{where}")


def import_megatron() -> None:
    """Import `megatron.core` without its notices that Transformer Engine and Apex are missing, silence what it warns
    of later and nobody can mend, and let the CPU stand in for CUDA where there is none."""
    # Kernels and collectives in one queue, so that tensor-parallel all-reduces overlap with the products after them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _MEGATRON_MODULES:
            importlib.import_module(module)
    for message, category in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)

    from megatron_llamapro.runtime import cpu

    cpu.install()
