"""Simulates megatron.core's pipeline schedules event by event: when each stage works and waits, and what it holds.

The schedules are 1F1B and interleaved 1F1B, as `megatron.core.pipeline_parallel.schedules` runs them. Frozen stages
skip work (`training/communication.py`): a chunk below the first trainable layer has no backward pass, and nothing waits
for its gradient. Positions are (virtual) stages in layer order: of P stages, chunk c of stage r is at c · P + r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkTime:
    """Seconds of one micro-batch in one (virtual) stage."""

    forward: float
    backward: float
    """0 if it has no backward pass."""

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: ChunkTime) -> ChunkTime:
        return ChunkTime(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Timeline:
    """One simulated step."""

    seconds: float
    busy: tuple[float, ...]
    """Seconds that each stage works."""
    in_flight: tuple[tuple[int, ...], ...]
    """Micro-batches that each stage holds, by chunk, at the moment when it holds the most in total."""

    @property
    def bubble(self) -> float:
        """The fraction of the step that stages spend waiting, averaged over all stages."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


Task = tuple[bool, int, int]
"""(whether it is forward, the stage's chunk, the micro-batch)."""


def stage_tasks(stage: int, *, num_stages: int, num_chunks: int, num_microbatches: int) -> list[Task]:
    """Return one stage's tasks in order. Several chunks need a multiple of `num_stages` micro-batches."""
    forwards = list(chunk_order(num_stages, num_chunks, num_microbatches))
    backwards = [(num_chunks - 1 - chunk, number) for chunk, number in forwards]
    if num_chunks == 1:
        warm_up = num_stages - stage - 1
    elif num_microbatches == num_stages:
        warm_up = len(forwards)
    else:
        warm_up = 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages
    warm_up = min(warm_up, len(forwards))
    tasks: list[Task] = [(True, *task) for task in forwards[:warm_up]]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        tasks += [(True, *forward), (False, *backward)]
    return tasks + [(False, *task) for task in backwards[len(forwards) - warm_up :]]


def chunk_order(num_stages: int, num_chunks: int, num_microbatches: int) -> Iterator[tuple[int, int]]:
    """Yield (chunk, micro-batch) of the forward passes in order: groups of P micro-batches, chunk after chunk."""
    for group in range(0, num_microbatches, num_stages):
        for chunk in range(num_chunks):
            for number in range(group, min(group + num_stages, num_microbatches)):
                yield chunk, number


def simulate(chunks: Sequence[ChunkTime], *, num_stages: int, num_microbatches: int, message: float = 0.0) -> Timeline:
    """Simulate one step of `chunks`, by position. `message`: seconds between a result and the next stage's start."""
    num_chunks = len(chunks) // num_stages
    tasks = [
        stage_tasks(stage, num_stages=num_stages, num_chunks=num_chunks, num_microbatches=num_microbatches)
        for stage in range(num_stages)
    ]
    ends: dict[tuple[bool, int, int], float] = {}
    clocks, done = [0.0] * num_stages, [0] * num_stages
    remaining = sum(map(len, tasks))
    while remaining:
        for stage in range(num_stages):
            while done[stage] < len(tasks[stage]):
                is_forward, chunk, number = tasks[stage][done[stage]]
                position = chunk * num_stages + stage
                needed = _needs(chunks, is_forward, position)
                if needed is not None and (is_forward, needed, number) not in ends:
                    break
                ready = 0.0 if needed is None else ends[is_forward, needed, number] + message
                time = chunks[position].forward if is_forward else chunks[position].backward
                clocks[stage] = (max(clocks[stage], ready) if time else clocks[stage]) + time
                ends[is_forward, position, number] = clocks[stage]
                done[stage] += 1
                remaining -= 1
    busy = tuple(
        num_microbatches * sum(chunks[position].total for position in range(stage, len(chunks), num_stages))
        for stage in range(num_stages)
    )
    return Timeline(max(clocks), busy, tuple(_most_held(stage_list, num_chunks) for stage_list in tasks))


def _needs(chunks: Sequence[ChunkTime], is_forward: bool, position: int) -> int | None:
    """Return the position whose result a task waits for, or None."""
    if is_forward:
        return position - 1 if position else None
    has_gradient = chunks[position].backward and position + 1 < len(chunks)
    return position + 1 if has_gradient else None


def _most_held(tasks: Sequence[Task], num_chunks: int) -> tuple[int, ...]:
    held, most = [0] * num_chunks, (0,) * num_chunks
    for is_forward, chunk, _ in tasks:
        held[chunk] += 1 if is_forward else -1
        if sum(held) > sum(most):
            most = tuple(held)
    return most


def step_seconds(chunks: Sequence[ChunkTime], *, num_stages: int, num_microbatches: int, message: float = 0.0) -> float:
    """Return `simulate(…).seconds`. Of many micro-batches only the first are simulated, because every later group takes
    as long as the one before."""
    enough = 12 * num_stages
    if num_microbatches <= 2 * enough:
        return simulate(chunks, num_stages=num_stages, num_microbatches=num_microbatches, message=message).seconds
    rest = (num_microbatches - enough) % num_stages
    short, long = (
        simulate(chunks, num_stages=num_stages, num_microbatches=number, message=message).seconds
        for number in (enough + rest, 2 * enough + rest)
    )
    return long + (long - short) * (num_microbatches - 2 * enough - rest) / enough
