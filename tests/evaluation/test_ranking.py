"""The choice of blocks, from scores that can be followed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_llamapro.evaluation.ranking import BlockScore, Ranking, SetScores
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.training.evaluation import HeldOutLoss

WHOLE = HeldOutLoss(2.0, 100, 400)
SCORES = {
    "english": SetScores(WHOLE, left_out=[5.0, 0.3, 0.1, 0.2, 0.9], stream_change=[2.0, 0.5, 0.4, 0.3, 0.7]),
    "python": SetScores(WHOLE, left_out=[4.0, 0.1, 0.4, 0.1, 0.8], stream_change=[2.1, 0.5, 0.4, 0.2, 0.1]),
    "new": SetScores(WHOLE, left_out=[3.0, 0.9, 0.9, 0.9, 0.0], stream_change=[2.2, 0.9, 0.9, 0.9, 0.0]),
}
RANKING = Ranking(SCORES, ["english", "python"], ["new"], BlockScore.LEFT_OUT, 2)


def test_the_least_mean_over_the_known_sets_is_chosen() -> None:
    """Means 4.5, 0.2, 0.25, 0.15, 0.85. The new set, on which block 4 matters least, does not decide."""
    assert RANKING.mean(["english", "python"]) == pytest.approx([4.5, 0.2, 0.25, 0.15, 0.85])
    assert (RANKING.chosen, RANKING.positions) == ((1, 3), (2, 5))
    by_stream = replace(RANKING, by=BlockScore.STREAM_CHANGE)
    assert (by_stream.chosen, by_stream.positions) == ((3, 4), (4, 6))


def test_the_positions_copy_the_chosen_blocks() -> None:
    for count in range(1, 6):
        ranking = replace(RANKING, num_added_blocks=count)
        plan = ExpansionPlan.unexpanded(5).expand(ranking.positions)
        assert tuple(plan.copied_from(position) for position in ranking.positions) == tuple(
            position - 1 for position in ranking.positions
        )
        assert tuple(plan.layers[position].source_layer for position in ranking.positions) == ranking.chosen


def test_a_score_that_is_not_a_number_counts_as_the_largest() -> None:
    known = SetScores(WHOLE, left_out=[math.nan, 3.0, math.inf], stream_change=[1.0, 1.0, 1.0])
    ranking = Ranking({"known": known}, ["known"], [], BlockScore.LEFT_OUT, 2)
    assert ranking.chosen == (1, 2)
    assert replace(ranking, by=BlockScore.STREAM_CHANGE).chosen == (0, 1)  # equal scores: the first blocks


def test_the_table_marks_the_chosen_blocks() -> None:
    header, *rows = RANKING.table().splitlines()
    assert header.split() == ["block"] + [
        word for name in ("english", "python", "new") for word in (name, "left_out", "stream_change")
    ]
    assert rows[1].split() == ["1", "+0.3000", "0.5000", "+0.1000", "0.5000", "+0.9000", "0.9000", "chosen"]
    assert [row.split()[0] for row in rows if "chosen" in row] == ["1", "3"]


def test_the_json_has_both_scores_of_every_block() -> None:
    content = RANKING.to_json()
    assert content["blocks"][3] == {
        "block": 3,
        "chosen": True,
        "scores": {
            "english": {"left_out": 0.2, "stream_change": 0.3},
            "python": {"left_out": 0.1, "stream_change": 0.2},
            "new": {"left_out": 0.9, "stream_change": 0.9},
        },
    }
    assert (content["by"], content["chosen"], content["positions"]) == ("left_out", [1, 3], [2, 5])
