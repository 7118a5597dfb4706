"""The benchmark's own verdict at real scale: a 7B model with added blocks executes exactly the expected work."""

from __future__ import annotations

import json
from pathlib import Path

import programs
from executed_work import Figure


def test_every_figure_meets_its_target(tmp_path: Path) -> None:
    result = programs.run("benchmarks/executed_work.py", "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 14 and all(figure["is_met"] for figure in figures)


def test_a_figure_off_its_target_is_reported() -> None:
    assert Figure("x", 34.5231, 34.52, "GFLOP").is_met and not Figure("x", 34.53, 34.52, "GFLOP").is_met
    assert Figure("x", 40.9, 41, "GiB", at_most=True).is_met and not Figure("x", 41.1, 41, "GiB", at_most=True).is_met
    assert not Figure("x", 1, 0, "bytes").is_met
