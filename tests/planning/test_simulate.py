"""Simulated schedules, compared with known results and with megatron.core's own tables."""

from __future__ import annotations

import pytest

from megatron_llamapro.planning.simulate import ChunkTime, chunk_order, simulate, stage_tasks, step_seconds


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 2), (2, 8), (4, 8), (4, 3), (8, 64)])
def test_equal_stages_have_the_known_bubble(stages: int, microbatches: int) -> None:
    """1F1B: stages wait (p - 1) / m of the ideal time (Narayanan et al. 2021, section 2.2.1)."""
    time = simulate([ChunkTime(1.0, 2.0)] * stages, num_stages=stages, num_microbatches=microbatches)
    assert time.seconds == 3.0 * (microbatches + stages - 1)
    assert time.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(2, 2, 4), (2, 2, 8), (4, 2, 8), (4, 3, 16)])
def test_interleaved_stages_have_the_known_bubble(stages: int, chunks: int, microbatches: int) -> None:
    """v chunks make it v times smaller: (p - 1) / (v m) (section 2.2.2)."""
    time = simulate([ChunkTime(1.0, 2.0)] * stages * chunks, num_stages=stages, num_microbatches=microbatches)
    assert time.seconds == 3.0 * (chunks * microbatches + stages - 1)


def test_a_schedule_computed_by_hand_is_reproduced() -> None:
    """Two stages, three micro-batches; stage 0 forward 2, backward 1, stage 1 forward 1, backward 3.

    Stage 0: F0 0-2, F1 2-4; stage 1: F0 2-3, B0 3-6, F1 6-7, B1 7-10; stage 0: B0 6-7, F2 7-9, B1 10-11;
    stage 1: F2 10-11, B2 11-14; stage 0: B2 14-15.
    """
    time = simulate([ChunkTime(2.0, 1.0), ChunkTime(1.0, 3.0)], num_stages=2, num_microbatches=3)
    assert time.seconds == 15.0 and time.busy == (9.0, 12.0)
    assert time.in_flight == ((2,), (1,))


def test_a_frozen_stage_waits_for_no_gradient() -> None:
    """It runs ahead: the second stage starts at 1 and never waits."""
    time = simulate([ChunkTime(1.0, 0.0), ChunkTime(1.0, 2.0)], num_stages=2, num_microbatches=5)
    assert time.seconds == 1.0 + 5 * 3.0


def test_messages_take_time() -> None:
    time = simulate([ChunkTime(1.0, 1.0)] * 2, num_stages=2, num_microbatches=1, message=0.5)
    assert time.seconds == 4.0 + 2 * 0.5


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2), (4, 3)])
def test_every_task_runs_once_within_the_in_flight_limit(stages: int, chunks: int) -> None:
    for stage in range(stages):
        tasks = stage_tasks(stage, num_stages=stages, num_chunks=chunks, num_microbatches=4 * stages)
        assert len(tasks) == len(set(tasks)) == 2 * chunks * 4 * stages
        for chunk in range(chunks):
            backwards = [number for is_forward, c, number in tasks if not is_forward and c == chunk]
            assert backwards == list(range(4 * stages))
    if chunks == 1:
        in_flight = simulate([ChunkTime(1.0, 1.0)] * stages, num_stages=stages, num_microbatches=4 * stages).in_flight
        assert in_flight == tuple((stages - stage,) for stage in range(stages))


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_extrapolated_long_steps_are_exact(stages: int, chunks: int) -> None:
    times = [ChunkTime(1.0 + 0.3 * (position % 3), 2.0 - 0.1 * position) for position in range(stages * chunks)]
    whole = simulate(times, num_stages=stages, num_microbatches=40 * stages).seconds
    assert step_seconds(times, num_stages=stages, num_microbatches=40 * stages) == pytest.approx(whole, rel=1e-9)


def test_the_order_is_megatron_cores() -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    for stages, chunks, microbatches in ((2, 2, 4), (4, 3, 12)):
        table = get_schedule_table(microbatches, chunks, stages)
        assert [(chunk, number) for number, chunk in table] == list(chunk_order(stages, chunks, microbatches))
