"""Runs with a penalty on what added blocks add: its record, its tokens, and its effect at any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

import workers
from gradients import parallel
from megatron_llamapro.config.schema import BlendEntry, KeepConfig, RecomputeConfig, RunConfig
from megatron_llamapro.testing.distributed import run_distributed


def penalised(config: RunConfig, *, weight: float = 3.0, penalty_on: str = "all", known: tuple = ()) -> RunConfig:
    """Return the configuration with a penalty. `known` says which of the two sources are."""
    entries = tuple(replace(entry, known=known[i]) if known else entry for i, entry in enumerate(config.data.train))
    return replace(config, keep=KeepConfig(weight, penalty_on), data=replace(config.data, train=entries))


def run(config: RunConfig, num_ranks: int = 1) -> workers.Result:
    return run_distributed(workers.train, num_ranks, config)[0]


def test_identity_blocks_have_no_penalty_and_trained_ones_less_with_it(run_config: Callable) -> None:
    """A weight of (almost) 0 changes nothing, so its run is that without a penalty, and shows what that adds."""
    with_it, hardly, without = (
        run(config)
        for config in (
            penalised(run_config(save="with")),
            penalised(run_config(save="hardly"), weight=1e-12),
            run_config(save="without"),
        )
    )
    assert without.penalties == [None] * 4
    assert hardly.figures == without.figures
    assert with_it.penalties[0] == hardly.penalties[0] == 0.0
    assert with_it.figures[0] == without.figures[0] and with_it.figures[-1] != without.figures[-1]
    assert all(0 < ours < theirs for ours, theirs in zip(with_it.penalties[2:], hardly.penalties[2:], strict=True))


@pytest.mark.parametrize("penalty_on", ["all", "known"])
def test_a_penalised_run_is_the_same_at_any_layout(penalty_on: str, run_config: Callable) -> None:
    """1e-4 after four steps: another order of summation."""
    known = {"penalty_on": penalty_on, "known": (False, True)}
    one = run(penalised(run_config(save="one"), **known))
    layout = parallel(tp=2, pp=2, sp=True)
    divided = penalised(run_config(save="divided", parallel=layout), **known)
    four = run(replace(divided, recompute=RecomputeConfig("full", "uniform", 1)), 4)
    assert four.penalties == pytest.approx(one.penalties, rel=1e-4)
    assert [loss for _, loss, *_ in four.figures] == pytest.approx([loss for _, loss, *_ in one.figures], rel=1e-4)


def test_only_tokens_of_known_sources_count(run_config: Callable) -> None:
    """Parts of the penalty add up to the whole, in a step that starts from the same weights: the second, since the
    penalty of identity blocks has no gradient."""
    marks = {"all": (True, True), "first": (True, False), "second": (False, True)}
    second = {
        name: run(penalised(run_config(save=name), penalty_on="known", known=known)).penalties[1]
        for name, known in marks.items()
    }
    assert second["first"] + second["second"] == pytest.approx(second["all"], rel=1e-6)
    assert min(second.values()) > 0
    everything = run(penalised(run_config(save="everything")))
    assert everything.penalties[1] == second["all"]


def test_a_single_source_can_be_known(run_config: Callable) -> None:
    config = run_config()
    only = replace(config, data=replace(config.data, train=(BlendEntry(config.data.train[0].prefix, known=True),)))
    assert run(penalised(only, penalty_on="known", known=(True,))).penalties[-1] > 0


def test_a_penalised_run_in_bfloat16_trains(run_config: Callable) -> None:
    result = run(penalised(run_config(dtype="bfloat16")))
    assert len(result.figures) == 4 and result.penalties[-1] > 0


def test_a_run_resumes_exactly_and_with_another_penalty(run_config: Callable) -> None:
    """The penalty is no part of the run's identity, like the learning rate."""
    whole = run(penalised(run_config(save="whole")))
    cut = [run(penalised(run_config(save="cut", exit_interval=2))) for _ in range(2)]
    assert [*cut[0].figures, *cut[1].figures] == whole.figures
    assert [*cut[0].penalties, *cut[1].penalties] == whole.penalties
    run(penalised(run_config(save="changed", exit_interval=2)))
    changed = run(penalised(run_config(save="changed", exit_interval=2), weight=1.0))
    assert changed.penalties[0] == whole.penalties[2] and changed.figures[0] != whole.figures[2]
