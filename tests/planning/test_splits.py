"""The planner finds the best possible split, and the known gains for the paper's model."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flops import ADDED, LLAMA2_7B

from megatron_llamapro.config.errors import PipelinePlanError
from megatron_llamapro.expansion.trainable_part import TrainablePart
from megatron_llamapro.planning.job import KINDS, Job, ModelTime, time_from_calibration, time_from_flops
from megatron_llamapro.planning.memory import Division, block_activations, chunk_bytes
from megatron_llamapro.planning.simulate import ChunkTime
from megatron_llamapro.planning.splits import Plan, balanced_plan, best_plan, even_plan, plan_of

GIB = 2**30
PRO = TrainablePart(frozenset(ADDED))


def job(num_stages: int, *, num_chunks: int = 1, world_size: int = 16, batch: int = 1024, **settings: object) -> Job:
    """7B + 8 blocks of the paper at micro-batch 1; times in GFLOP per token."""
    division = Division(data_size=world_size // num_stages)
    time = time_from_flops(LLAMA2_7B, PRO, division, flops_per_second=4096 * 1e9)
    microbatches = batch // division.data_size
    return Job(LLAMA2_7B, PRO, division, time, num_stages, num_chunks, microbatches, **settings)


# GFLOP per token of the slowest stage, even and best (as counted by the dry run), and the gain.
@pytest.mark.parametrize(
    ("num_stages", "even", "best", "gain"), [(2, 20.35, 19.44, 1.046), (4, 10.44, 9.91, 1.052), (8, 5.48, 4.96, 1.103)]
)
def test_the_papers_model_gains_as_computed(num_stages: int, even: float, best: float, gain: float) -> None:
    split, plan = even_plan(job(num_stages)), best_plan(job(num_stages))
    assert slowest(split) == pytest.approx(even, abs=0.01) and slowest(plan) == pytest.approx(best, abs=0.01)
    assert slowest(split) / slowest(plan) == pytest.approx(gain, abs=0.003)
    assert split.seconds / plan.seconds == pytest.approx(gain, abs=0.002)


def test_the_papers_model_needs_the_computed_memory() -> None:
    alone = chunk_bytes(LLAMA2_7B, range(40), is_first=True, is_last=True, trains=PRO, division=Division())
    assert alone.state / GIB == pytest.approx(39.7, abs=0.05)
    per_token = [block_activations(LLAMA2_7B, Division(), trains=PRO, layer=layer) / 4096 for layer in (5, 4)]
    assert per_token == [93_320, 131_720]


def test_a_memory_limit_moves_layers() -> None:
    """Without a limit the first stage has the most layers. A limit below its needs moves some of them away."""
    free = best_plan(job(4))
    limit = max(free.stage_bytes) * 0.97
    tight = best_plan(job(4, memory_bytes=limit))
    assert max(tight.stage_bytes) <= limit and tight.seconds >= free.seconds and tight.counts != free.counts
    with pytest.raises(PipelinePlanError, match="no split fits: the even one needs"):
        best_plan(job(4, memory_bytes=GIB))


def splits(num_layers: int, positions: int):
    for cuts in combinations(range(1, num_layers), positions - 1):
        edges = (0, *cuts, num_layers)
        yield tuple(after - before for before, after in pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from([(1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (1.3, 1.7)]), min_size=4, max_size=9),
    layout=st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2)]),
    head=st.floats(0.0, 2.0),
    groups=st.integers(1, 4),
)
def test_no_split_is_better(kinds: list, layout: tuple[int, int], head: float, groups: int) -> None:
    """Compare with every possible split."""
    num_stages, num_chunks = layout
    first = next((i for i, (_, backward) in enumerate(kinds) if backward), len(kinds))
    kinds = [(forward, 0.0 if i < first else max(backward, 1.0)) for i, (forward, backward) in enumerate(kinds)]
    shape = dataclasses.replace(LLAMA2_7B, num_layers=len(kinds))
    time = ModelTime(tuple(ChunkTime(*kind) for kind in kinds), ChunkTime(0.0, 0.0), ChunkTime(head, head))
    trains = TrainablePart(frozenset(range(first, len(kinds))))
    small = Job(shape, trains, Division(), time, num_stages, num_chunks, groups * num_stages)
    plan = best_plan(small)
    best = min(plan_of(small, counts).seconds for counts in splits(len(kinds), num_stages * num_chunks))
    assert plan.seconds == pytest.approx(best) and plan.is_proven
    if num_chunks == 1:
        fastest = min(slowest(plan_of(small, counts)) for counts in splits(len(kinds), num_stages))
        assert slowest(balanced_plan(small)) == pytest.approx(fastest)


def slowest(plan: Plan) -> float:
    """Return seconds per micro-batch of the slowest stage."""
    return max(forward + backward for forward, backward in zip(plan.stage_forward, plan.stage_backward, strict=True))


def test_a_balanced_split_respects_the_memory_limit() -> None:
    free = balanced_plan(job(4))
    assert free.seconds < 1.001 * best_plan(job(4)).seconds
    limit = max(free.stage_bytes) * 0.97
    tight = balanced_plan(job(4, memory_bytes=limit))
    assert max(tight.stage_bytes) <= limit and slowest(tight) >= slowest(free)
    with pytest.raises(PipelinePlanError, match="no split fits: the even one needs"):
        balanced_plan(job(4, memory_bytes=GIB))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PipelinePlanError, match="40 layers cannot fill 64"):
        best_plan(job(16, num_chunks=4))


def test_measured_times_are_used() -> None:
    measured = {kind: {"forward": number + 1.0, "backward": 0.5 * number} for number, kind in enumerate(KINDS)}
    time = time_from_calibration(LLAMA2_7B, PRO, measured)
    assert time.layers[0] == ChunkTime(1.0, 0.0) and time.layers[4] == ChunkTime(3.0, 1.0)
    assert time.layers[5] == ChunkTime(2.0, 0.5) and time.head == ChunkTime(4.0, 1.5)
    with pytest.raises(PipelinePlanError, match="no forward and backward seconds of 'head'"):
        time_from_calibration(LLAMA2_7B, PRO, {**measured, "head": {}})
