"""Which checkpoints are removed: properties over any set of steps, and the folders of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llamapro.training.checkpoints.saver import clear_leftovers, prune, superseded

STEPS = st.sets(st.integers(1, 60), min_size=1)


@given(STEPS, st.integers(1, 70), st.none() | st.integers(1, 8))
def test_the_newest_and_the_multiples_are_kept(steps: set[int], keep_last: int, keep_every: int | None) -> None:
    """The newest `keep_last` and the multiples of `keep_every` are kept. Anything newer than the newest complete one is
    never removed. Everything else is removed."""
    newest = sorted(steps)[len(steps) // 2]
    gone = superseded(steps, newest=newest, keep_last=keep_last, keep_every=keep_every)
    complete = sorted(step for step in steps if step <= newest)
    assert newest not in gone and not any(step > newest for step in gone)
    for step in complete:
        stays = step in complete[-keep_last:] or (keep_every is not None and step % keep_every == 0)
        assert (step in gone) is not stays
    assert gone == sorted(gone)


@given(STEPS)
def test_all_checkpoints_are_kept_by_default(steps: set[int]) -> None:
    assert superseded(steps, newest=max(steps), keep_last=None, keep_every=None) == []


@pytest.fixture
def save(tmp_path: Path) -> Path:
    for name in ("base", "iter_0000001", "iter_0000002", "iter_0000003", "iter_0000004.ab12cd34.tmp", "iter_old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors").write_text("…")
    return tmp_path


def test_only_checkpoints_are_removed(save: Path) -> None:
    prune(save, newest=3, keep_last=1, keep_every=None, needed=[save / "iter_0000001"])
    left = {path.name for path in save.iterdir()}
    assert left == {"base", "iter_0000001", "iter_0000003", "iter_0000004.ab12cd34.tmp", "iter_old"}


def test_incomplete_checkpoints_are_cleared(save: Path) -> None:
    clear_leftovers(save)
    assert {path.name for path in save.iterdir()} == {
        "base",
        "iter_0000001",
        "iter_0000002",
        "iter_0000003",
        "iter_old",
    }
