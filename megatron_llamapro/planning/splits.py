"""Finds the split of layers over (virtual) stages with the least step time that fits into memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_llamapro.config.errors import PipelinePlanError
from megatron_llamapro.config.pipeline_stages import even_stage_layers
from megatron_llamapro.config.values import GIB
from megatron_llamapro.planning.job import ChunkCost, Job
from megatron_llamapro.planning.memory import ChunkBytes
from megatron_llamapro.planning.simulate import ChunkTime, simulate, step_seconds

_MOST_SPLITS = 20_000  # to try before the search takes the best so far


@dataclass(frozen=True)
class Plan:
    """A split and its costs."""

    counts: tuple[int, ...]
    """Layers by position, as in `parallel.pipeline_stage_layers`."""
    seconds: float
    """Per step, without the optimizer."""
    bubble: float
    stage_forward: tuple[float, ...]
    """Seconds per micro-batch, by stage."""
    stage_backward: tuple[float, ...]
    stage_bytes: tuple[float, ...]
    is_proven: bool = True
    """Whether no better split can exist under this cost model."""


def plan_of(job: Job, counts: Sequence[int], *, is_proven: bool = True) -> Plan:
    """Return a split with its costs."""
    chunks = job.chunks(counts)
    times = [chunk.time for chunk in chunks]
    seconds = step_seconds(times, num_stages=job.num_stages, num_microbatches=job.num_microbatches, message=job.message)

    def by_stage(value: Callable[[ChunkTime], float]) -> tuple[float, ...]:
        return tuple(
            sum(value(times[position]) for position in range(stage, len(times), job.num_stages))
            for stage in range(job.num_stages)
        )

    forward, backward = by_stage(lambda time: time.forward), by_stage(lambda time: time.backward)
    busy = job.num_microbatches * (sum(forward) + sum(backward))
    return Plan(
        counts=tuple(counts),
        seconds=seconds,
        bubble=1 - busy / (job.num_stages * seconds),
        stage_forward=forward,
        stage_backward=backward,
        stage_bytes=_stage_bytes(job, chunks),
        is_proven=is_proven,
    )


def _stage_bytes(job: Job, chunks: Sequence[ChunkCost]) -> tuple[float, ...]:
    """Return each stage's bytes at its peak: its state, and the activations of micro-batches in flight."""
    held = [chunk.held for chunk in chunks]
    return tuple(_held(held[stage :: job.num_stages], in_flight) for stage, in_flight in enumerate(_in_flight(job)))


def _in_flight(job: Job) -> tuple[tuple[int, ...], ...]:
    """Return the micro-batches in flight by stage and chunk. They depend only on the schedule; once the pipeline is
    full, more micro-batches change nothing."""
    return _scheduled(job.num_stages, job.num_positions, min(job.num_microbatches, 2 * job.num_stages))


@functools.cache
def _scheduled(num_stages: int, num_positions: int, num_microbatches: int) -> tuple[tuple[int, ...], ...]:
    times = [ChunkTime(1.0, 1.0)] * num_positions
    return simulate(times, num_stages=num_stages, num_microbatches=num_microbatches).in_flight


def _held(chunks: Sequence[ChunkBytes], in_flight: Sequence[int]) -> float:
    always = sum(chunk.state + number * chunk.activations for chunk, number in zip(chunks, in_flight, strict=True))
    return always + max(chunk.recomputed for chunk in chunks)


def even_plan(job: Job) -> Plan:
    """Return the most even split, which a run without a plan uses."""
    return plan_of(job, even_stage_layers(len(job.time.layers), job.num_positions), is_proven=False)


def best_plan(job: Job) -> Plan:
    """Return the split with the least step time that fits.

    The search is bounded: a step takes at least as long as its slowest stage works. It starts from the even split,
    improved by moving single layers over boundaries while that helps.

    Raises:
        PipelinePlanError: no split fits into memory.
    """
    if len(job.time.layers) < job.num_positions:
        raise PipelinePlanError(
            f"{len(job.time.layers)} layers cannot fill {job.num_positions} (virtual) stages: use fewer stages"
        )
    in_flight = _in_flight(job)
    even = even_plan(job)
    best = _mended(job, even.counts)
    limit, tried = [best.seconds if best else float("inf")], 0
    for counts in _splits(job, limit, in_flight):
        tried += 1
        if tried > _MOST_SPLITS:
            break
        plan = plan_of(job, counts)
        if plan.seconds < limit[0] and _fits(job, plan):
            best, limit[0] = plan, plan.seconds
    if best is None:
        raise _does_not_fit(job, even)
    return plan_of(job, best.counts, is_proven=tried <= _MOST_SPLITS)


def balanced_plan(job: Job) -> Plan:
    """Return the split whose slowest stage is fastest, among those that fit. With many micro-batches it is nearly the
    best split, and it takes one pass instead of the thousands of splits that `best_plan` tries. No virtual stages.

    Raises:
        PipelinePlanError: no split fits into memory.
    """
    num_layers, stages, in_flight = len(job.time.layers), job.num_stages, _in_flight(job)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by layers laid so far: slowest stage, counts
    for stage in range(stages):
        extended: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (slowest, counts) in best.items():
            left = stages - stage - 1
            for count in range(1, num_layers - first - left + 1) if left else [num_layers - first]:
                chunk = job.chunk(stage, first, count)
                if _held([chunk.held], in_flight[stage]) > job.memory_bytes:
                    break
                seconds = max(slowest, chunk.time.total)
                if seconds < extended.get(first + count, (float("inf"),))[0]:
                    extended[first + count] = (seconds, (*counts, count))
        best = extended
    if num_layers not in best:
        raise _does_not_fit(job, even_plan(job))
    return plan_of(job, best[num_layers][1], is_proven=False)


def _does_not_fit(job: Job, even: Plan) -> PipelinePlanError:
    needed, there = max(even.stage_bytes) / GIB, job.memory_bytes / GIB
    return PipelinePlanError(
        f"no split fits: the even one needs {needed:.1f} GiB on its largest stage, but a rank has {there:.1f}: use "
        "more tensor-parallel ranks or stages, or a smaller micro-batch"
    )


def _mended(job: Job, counts: Sequence[int]) -> Plan | None:
    """Improve a split: move single layers over boundaries while the step gets faster. None if no split found fits."""
    best = plan_of(job, counts)
    improved = True
    while improved:
        improved = False
        for moved in _neighbours(best.counts):
            plan = plan_of(job, moved)
            if _fits(job, plan) and (plan.seconds < best.seconds or not _fits(job, best)):
                best, improved = plan, True
    return best if _fits(job, best) else None


def _fits(job: Job, plan: Plan) -> bool:
    return max(plan.stage_bytes) <= job.memory_bytes


def _neighbours(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the splits with one layer moved from a position to any other, which shifts the layers in between."""
    for source in range(len(counts)):
        for target in range(len(counts)):
            if source != target and counts[source] > 1:
                moved = list(counts)
                moved[source] -= 1
                moved[target] += 1
                yield tuple(moved)


def _splits(job: Job, limit: Sequence[float], in_flight: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Yield splits whose stages all fit and whose slowest stage takes less than `limit[0]`. The caller may lower it."""
    num_layers, positions = len(job.time.layers), job.num_positions
    work = [0.0] * job.num_stages
    held = [0.0] * job.num_stages
    counts: list[int] = []

    def extend(first: int) -> Iterator[tuple[int, ...]]:
        position = len(counts)
        if position == positions:
            yield tuple(counts)
            return
        left = positions - position - 1
        sizes = [num_layers - first] if left == 0 else range(1, num_layers - first - left + 1)
        stage, chunk = position % job.num_stages, position // job.num_stages
        for count in sizes:
            new = job.chunk(position, first, count)
            seconds, num_bytes = new.time.total, new.held.state + in_flight[stage][chunk] * new.held.activations
            too_slow = (work[stage] + seconds) * job.num_microbatches >= limit[0]
            if too_slow or held[stage] + num_bytes > job.memory_bytes:
                if left:
                    return  # more layers are even slower and larger
                continue
            work[stage] += seconds
            held[stage] += num_bytes
            counts.append(count)
            yield from extend(first + count)
            counts.pop()
            work[stage] -= seconds
            held[stage] -= num_bytes

    yield from extend(0)
