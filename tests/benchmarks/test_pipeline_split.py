"""The benchmark of planned splits runs. Its numbers mean nothing at this size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline_split import main


def test_it_prints_the_planned_split_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Run in this process, because its ranks are forked from this process's fork server."""
    monkeypatch.setattr(sys, "argv", ["pipeline_split.py", "--tiny", "--json", str(tmp_path / "split.json")])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "| planned | (" in printed
    layers = {row.split(" | ")[0]: row.split(" | ")[1] for row in printed.splitlines() if " | (" in row}
    found = json.loads((tmp_path / "split.json").read_text())
    # The planner may find that the even split is the best one: it plans with measured times.
    assert found["predicted"] > 1 or layers["| planned"] == layers["| even"]
    assert all(len(steps) == 2 for steps in found["seconds"].values())
