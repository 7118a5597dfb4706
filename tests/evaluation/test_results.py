"""The choice of a scale, the gain at no loss, and tables, from figures that can be followed by hand."""

from __future__ import annotations

import math

import pytest

from megatron_llamapro.evaluation.results import Choice, Curve

# The loss of a new domain and of two known sets, by scale: the figures of a real run.
BYTECODE = {
    0.0: {"new": 1.956, "english": 3.013, "python": 2.482},
    0.5: {"new": 1.350, "english": 2.998, "python": 2.454},
    0.75: {"new": 1.237, "english": 3.042, "python": 2.498},
    1.0: {"new": 1.204, "english": 3.121, "python": 2.587},
}


def curve(losses: dict, known: tuple[str, ...] = ("english", "python")) -> Curve:
    return Curve(losses, ("new",), known)


def test_the_choice_gains_most_within_the_tolerance() -> None:
    choice = curve(BYTECODE).choice(0.01)
    assert choice == Choice(0.5, pytest.approx(0.606), pytest.approx(-0.015))
    assert curve(BYTECODE).choice(0.03).scale == 0.75
    assert curve(BYTECODE).choice(1.0).scale == 1.0


def test_the_original_is_chosen_if_every_scale_loses_too_much() -> None:
    assert curve({0.0: {"new": 2.0, "english": 3.0}, 1.0: {"new": 1.0, "english": 3.5}}, ("english",)).choice(
        0.01
    ) == Choice(0.0, 0.0, 0.0)


def test_the_gain_at_no_loss_lies_between_scales() -> None:
    """English crosses +0.010 at 25 / 44 of the way from scale 0.5 to 0.75, where the gain rises by 0.113."""
    assert curve(BYTECODE).gain_at_no_loss(0.01) == pytest.approx(0.606 + 25 / 44 * 0.113)


def test_the_gain_at_no_loss_is_all_of_it_if_nothing_is_lost() -> None:
    losses = {0.0: {"new": 2.0, "english": 3.0}, 1.0: {"new": 1.5, "english": 2.9}}
    assert curve(losses, ("english",)).gain_at_no_loss(0.01) == pytest.approx(0.5)


def test_the_gain_at_no_loss_is_below_the_first_scale_if_that_loses_too_much() -> None:
    losses = {0.0: {"new": 2.0, "english": 3.0}, 1.0: {"new": 1.0, "english": 3.04}}
    assert curve(losses, ("english",)).gain_at_no_loss(0.01) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("at_one", "said"),
    [
        (
            (1.5, 3.005),
            "--added_block_scale 1 gains most within the tolerance: the loss of new falls by 0.5000, and no ",
        ),
        (
            (1.5, 3.1),
            "every scale that lowers the loss of new makes english worse by more than 0.01: try smaller scales",
        ),
        ((2.0, 2.9), "no scale lowers the loss of new: was this checkpoint trained, and are the sets of --new the "),
        ((math.nan, 2.9), "losses above scale 0 are not numbers: the run diverged"),
    ],
)
def test_the_conclusion_says_what_to_choose_or_why_there_is_nothing(at_one: tuple[float, float], said: str) -> None:
    losses = {0.0: {"new": 2.0, "english": 3.0}, 1.0: dict(zip(("new", "english"), at_one, strict=True))}
    assert curve(losses, ("english",)).conclusion(0.01).startswith(said)


def test_the_conclusion_names_a_new_set_that_got_worse() -> None:
    losses = {0.0: {"a": 2.0, "b": 3.0, "k": 1.0}, 1.0: {"a": 1.0, "b": 3.2, "k": 0.9}}
    said = Curve(losses, ("a", "b"), ("k",)).conclusion(0.01)
    assert "the mean loss of a, b falls by 0.4000 (but b is worse by 0.2000)" in said
    assert said.endswith("no known set is worse than the original")


def test_a_new_domain_of_several_sets_gains_their_mean() -> None:
    losses = {0.0: {"a": 2.0, "b": 3.0, "k": 1.0}, 1.0: {"a": 1.0, "b": 2.8, "k": 1.0}}
    assert Curve(losses, ("a", "b"), ("k",)).gain(1.0) == pytest.approx(0.6)


def test_the_table_has_a_row_per_scale() -> None:
    lines = curve(BYTECODE).table().splitlines()
    assert lines[0].split() == ["scale", "new", "change", "english", "change", "python", "change"]
    assert lines[2].split() == ["0.5", "1.3500", "-0.6060", "2.9980", "-0.0150", "2.4540", "-0.0280"]
