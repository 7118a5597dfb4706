"""A training job for planning: the cost of its layers on a stage in seconds and bytes, and speed and cost of the run.

Seconds come from FLOPs, or from what a short run on the machine measured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_llamapro.checkpoint.description import trains_of
from megatron_llamapro.config.checks import count_microbatches, data_parallel_size
from megatron_llamapro.config.errors import PipelinePlanError
from megatron_llamapro.config.schema import RecomputeConfig, RunConfig
from megatron_llamapro.config.values import DTYPES
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable_part import TrainablePart
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.flops import Work, head_work, layer_work, step_work
from megatron_llamapro.planning.memory import (
    KEEP_ALL,
    ChunkBytes,
    Division,
    chunk_bytes,
    recomputed_groups,
    share_of_forward,
)
from megatron_llamapro.planning.simulate import ChunkTime


@dataclass(frozen=True)
class ModelTime:
    """Seconds of one micro-batch on one rank, part by part, without recomputation."""

    layers: tuple[ChunkTime, ...]
    embedding: ChunkTime
    head: ChunkTime

    def __add__(self, other: ModelTime) -> ModelTime:
        """Add the times part by part, as if one ran after the other."""
        layers = tuple(mine + its for mine, its in zip(self.layers, other.layers, strict=True))
        return ModelTime(layers, self.embedding + other.embedding, self.head + other.head)


@dataclass(frozen=True)
class ChunkCost:
    """Time and memory of the layers on one (virtual) stage."""

    time: ChunkTime
    held: ChunkBytes


@dataclass(frozen=True)
class Job:
    """A model, how it is divided, and its costs: the planner's input."""

    shape: ModelShape
    trains: TrainablePart
    division: Division
    time: ModelTime
    num_stages: int
    num_chunks: int
    """Virtual stages per stage; 1 means none."""
    num_microbatches: int
    memory_bytes: float = float("inf")
    message: float = 0.0
    """Seconds per message between stages."""
    recompute: RecomputeConfig = KEEP_ALL

    @property
    def num_positions(self) -> int:
        """The number of (virtual) stages. Positions follow the order of the layers."""
        return self.num_stages * self.num_chunks

    def chunks(self, counts: Sequence[int]) -> tuple[ChunkCost, ...]:
        """Return the time and memory of every position under a split."""
        starts = [sum(counts[:position]) for position in range(len(counts))]
        return tuple(self.chunk(position, start, counts[position]) for position, start in enumerate(starts))

    def chunk(self, position: int, first: int, count: int) -> ChunkCost:
        """Return the cost of `count` layers from `first` on, with the embedding if it is first and the head if last."""
        is_first, is_last = position == 0, position == self.num_positions - 1
        key = (first, count, is_first, is_last)
        if key not in self._known:
            layers = range(first, first + count)
            held = chunk_bytes(
                self.shape,
                layers,
                is_first=is_first,
                is_last=is_last,
                trains=self.trains,
                division=self.division,
                recompute=self.recompute,
            )
            self._known[key] = ChunkCost(self._time(layers, is_first=is_first, is_last=is_last), held)
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[tuple[int, int, bool, bool], ChunkCost]:
        """A cache, because a search asks for the same few hundred chunks millions of times."""
        return {}

    def _time(self, layers: range, *, is_first: bool, is_last: bool) -> ChunkTime:
        parts = [self.time.layers[layer] for layer in layers]
        parts += [self.time.embedding] * is_first + [self.time.head] * is_last
        backward = [layer for layer in layers if layer >= self.trains.first_layer(self.shape.num_layers)]
        whole = {layer for group in recomputed_groups(backward, self.recompute) for layer in group}
        again = sum(
            self.time.layers[layer].forward * (1.0 if layer in whole else self._share_again(layer))
            for layer in backward
        )
        return ChunkTime(sum(part.forward for part in parts), sum(part.backward for part in parts) + again)

    def _share_again(self, layer: int) -> float:
        seq_length = self.division.seq_length
        return share_of_forward(self.shape, layer, self.recompute, seq_length=seq_length, trains=self.trains)


# The parts that a calibration measures, in seconds per micro-batch.
KINDS = ("below", "frozen", "trainable", "head", "embedding")


def time_from_flops(
    shape: ModelShape, trains: TrainablePart, division: Division, *, flops_per_second: float
) -> ModelTime:
    """Return times by arithmetic. `flops_per_second` is a rank's real rate: its peak times the fraction it reaches."""

    def of(work: Work) -> ChunkTime:
        scale = division.tokens / division.tensor_size / flops_per_second
        return ChunkTime(work.forward * scale, (work.input_gradient + work.weight_gradient) * scale)

    layers = tuple(
        of(layer_work(shape, layer, seq_length=division.seq_length, trains=trains)) for layer in range(shape.num_layers)
    )
    return ModelTime(layers, ChunkTime(0.0, 0.0), of(head_work(shape, trains=trains)))


def kind_of(layer: int, shape: ModelShape, trains: TrainablePart) -> str:
    """Return the layer's kind, one of `KINDS`."""
    if layer in trains.layers:
        return "trainable"
    return "frozen" if layer >= trains.first_layer(shape.num_layers) else "below"


def time_from_calibration(shape: ModelShape, trains: TrainablePart, measured: Mapping[str, object]) -> ModelTime:
    """Return times from `measured`: forward and backward seconds of each kind, as `training.calibration` writes them.

    Raises:
        PipelinePlanError: a figure is missing or is not a number.
    """
    times = {}
    for kind in KINDS:
        try:
            times[kind] = ChunkTime(float(measured[kind]["forward"]), float(measured[kind]["backward"]))  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise PipelinePlanError(
                f"the calibration has no forward and backward seconds of '{kind}': write it with --calibrate"
            ) from None
    layers = tuple(times[kind_of(layer, shape, trains)] for layer in range(shape.num_layers))
    return ModelTime(layers, times["embedding"], times["head"])


def division_of(config: RunConfig, world_size: int) -> Division:
    """Return how a job divides model and batch over its ranks, without the pipeline. Raises as `data_parallel_size`."""
    return Division(
        tensor_size=config.parallel.tensor_model_parallel_size,
        data_size=data_parallel_size(config, world_size),
        sequence_parallel=config.parallel.sequence_parallel,
        micro_batch_size=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
        itemsize=ITEMSIZES[DTYPES[config.training.precision]],
    )


def job_of(
    config: RunConfig,
    shape: ModelShape,
    plan: ExpansionPlan,
    *,
    world_size: int,
    flops_per_second: float,
    memory_bytes: float = float("inf"),
) -> Job:
    """Return the job that `config` describes, with times by arithmetic. `flops_per_second` is a rank's real rate."""
    trains, division = trains_of(config, shape, plan), division_of(config, world_size)
    training = config.training
    return Job(
        shape=shape,
        trains=trains,
        division=division,
        time=time_from_flops(shape, trains, division, flops_per_second=flops_per_second),
        num_stages=config.parallel.pipeline_model_parallel_size,
        num_chunks=config.parallel.virtual_pipeline_model_parallel_size or 1,
        num_microbatches=count_microbatches(
            training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_size=division.data_size,
        ),
        recompute=config.recompute,
        memory_bytes=memory_bytes,
    )


@dataclass(frozen=True)
class RunCost:
    """Speed and cost of a run."""

    tokens_per_second: float
    """Over all ranks."""
    model_flops_utilization: float
    """FLOPs that the training needs, as a fraction of the ranks' peak."""
    gpu_hours: float
    """For the requested tokens."""


PEAK_TFLOPS, EFFICIENCY, TOKENS = 989, 0.4, 80e9
"""An H100's dense bfloat16 from its data sheet; a round number (docs/planning.md); the paper's tokens."""


def run_cost(job: Job, seconds: float, *, peak_tflops: float = PEAK_TFLOPS, tokens: float = TOKENS) -> RunCost:
    """Return speed and cost of a job whose step takes `seconds`."""
    division = job.division
    num_ranks = division.tensor_size * job.num_stages * division.data_size
    speed = job.num_microbatches * division.tokens * division.data_size / seconds
    work = step_work(job.shape, seq_length=division.seq_length, trains=job.trains).total
    return RunCost(speed, work * speed / (num_ranks * peak_tflops * 1e12), tokens / speed / 3600 * num_ranks)
