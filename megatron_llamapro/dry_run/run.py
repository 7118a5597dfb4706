"""Runs a training step as any rank of any world on fake tensors, with the program's own model, optimizer and step.

The counts are exact for the program that ran, because they count torch's calls. The kernels are those of the machine:
without a GPU they are the CPU's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from megatron_llamapro.checkpoint.description import DescribedModel, check_runs_dry
from megatron_llamapro.config.checks import count_microbatches
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.dry_run.counting import CountingMode, Counts, HeldMemory, Kind, SavedActivations
from megatron_llamapro.dry_run.fake_world import fake_world, watched_messages
from megatron_llamapro.model.freeze import StageReport
from megatron_llamapro.runtime.distributed import process_groups
from megatron_llamapro.training.machine import Machine, build_machine
from megatron_llamapro.training.step import Batch, train_step


@dataclass(frozen=True)
class RankReport:
    """What one rank holds, executes and sends."""

    rank: int
    stage: int
    stage_report: StageReport
    counts: Counts
    """For one step of `num_microbatches`. It is not the first step, so the optimizer state exists."""
    held_bytes: Mapping[Kind, int]
    """Between steps."""
    saved_bytes: float
    """Activations kept for the backward pass, per micro-batch."""
    message_bytes: Mapping[str, int]
    """`activations` sent to the next stage and `gradients` to the one before, in the counted step."""
    num_microbatches: int
    """In the counted step: as many as fill the pipeline, not all of a whole step."""
    tokens: int
    """In the counted step."""
    largest: Sequence[tuple[int, int, HeldMemory]]
    """At the peak, equal pieces grouped: their number, their total bytes, one of them."""
    seconds: float


def distinct_ranks(config: RunConfig, world_size: int) -> list[int]:
    """Return one rank per stage. All ranks of a stage hold, execute and send the same amounts."""
    stages = config.parallel.pipeline_model_parallel_size
    return [stage * (world_size // stages) for stage in range(stages)]


def dry_run(
    config: RunConfig, model: DescribedModel, *, world_size: int, rank: int, num_largest: int = 0
) -> RankReport:
    """Build the job's rank `rank` and run two steps; the second is counted. With `num_largest`, a third step examines
    the peak. Takes seconds. Call `runtime.cpu.install` first.

    Raises:
        ConfigError: the job could not start.
    """
    check_runs_dry(config, model, world_size)
    started = time.perf_counter()
    with fake_world(rank, world_size):
        machine = build_machine(config, model.shape, model.plan, load=lambda models: None)
        num_microbatches = _enough_microbatches(config, machine)
        saved = SavedActivations(parameter for chunk in machine.chunks for parameter in chunk.parameters())
        with saved.hooks:
            _step(config, machine, num_microbatches)  # makes the optimizer's moments
        mode, messages = counting(machine), Counter()
        held = dict(mode.by_kind)
        with watched_messages(messages), mode:
            _step(config, machine, num_microbatches, mode.begin_update)
        largest: Sequence = ()
        if num_largest:
            again = counting(machine, snapshot_at=mode.counts.peak_op)
            with again:
                _step(config, machine, num_microbatches, again.begin_update)
            largest = tuple(islice(again.largest(), num_largest))
        return RankReport(
            rank=rank,
            stage=machine.layout.pipeline_rank,
            stage_report=machine.report,
            counts=mode.counts,
            held_bytes=held,
            saved_bytes=saved.num_bytes / num_microbatches,
            message_bytes=messages,
            num_microbatches=num_microbatches,
            tokens=num_microbatches * config.training.micro_batch_size * config.data.seq_length,
            largest=largest,
            seconds=time.perf_counter() - started,
        )


def _enough_microbatches(config: RunConfig, machine: Machine) -> int:
    """Return the micro-batches that fill the pipeline, so that as many activations are in flight as in a whole step."""
    layout, training = machine.layout, config.training
    in_step = count_microbatches(
        training.global_batch_size, micro_batch_size=training.micro_batch_size, data_parallel_size=layout.data_size
    )
    filling = layout.pipeline_size * (2 if layout.virtual_pipeline_size else 1)
    return min(in_step, max(2, filling))


def _step(
    config: RunConfig, machine: Machine, num_microbatches: int, before_update: Callable[[], None] | None = None
) -> None:
    micro_batch_size, seq_length = config.training.micro_batch_size, config.data.seq_length
    train_step(
        machine,
        [_batches(micro_batch_size, seq_length) for _ in machine.chunks],
        num_microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        before_update=before_update,
    )


def _batches(micro_batch_size: int, seq_length: int) -> Iterator[Batch]:
    while True:
        tokens = torch.zeros(micro_batch_size, seq_length, dtype=torch.int64)
        positions = torch.arange(seq_length).expand(micro_batch_size, seq_length)
        mask = torch.ones(micro_batch_size, seq_length)
        yield {"tokens": tokens, "labels": tokens.clone(), "loss_mask": mask, "position_ids": positions}


def counting(machine: Machine, *, snapshot_at: int | None = None) -> CountingMode:
    """Return a counter that knows the memory that the machine holds between steps."""
    mode = CountingMode(group_names=_group_names(), snapshot_at=snapshot_at)
    for chunk in machine.chunks:
        mode.know_weights(chunk.parameters())
        mode.hold([*chunk.parameters(), *chunk.module.buffers()], Kind.WEIGHTS)
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            mode.hold([buffer.grad_data], Kind.GRADIENTS)
    for part in machine.optimizer.chained_optimizers:
        if part.optimizer is not None:
            mode.hold([weight for group in part.optimizer.param_groups for weight in group["params"]], Kind.MASTER)
            states = part.optimizer.state.values()
            mode.hold([value for state in states for value in state.values() if torch.is_tensor(value)], Kind.MOMENTS)
    return mode


# megatron.core's groups → their names in a report. The first name that fits a group counts.
_GROUPS = {"tp": "tensor", "pp": "pipeline", "dp": "data", "dp_cp": "data", "embd": "embedding", "mp": "model"}


def _group_names() -> dict[str, str]:
    groups = process_groups()
    names: dict[str, str] = {}
    for name, called in _GROUPS.items():
        group = getattr(groups, name, None)
        if group is not None:
            names.setdefault(group.group_name, called)
    return names
