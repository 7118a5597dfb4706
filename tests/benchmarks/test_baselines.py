"""docs/baselines.md holds the table that benchmarks/baselines.py prints."""

from __future__ import annotations

from pathlib import Path

import programs
from baselines import FOLDER, ROWS


def test_the_page_holds_the_printed_table() -> None:
    result = programs.run("benchmarks/baselines.py", timeout=280)  # a dry run for every row
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == len(ROWS) + 2 and result.stdout in Path("docs/baselines.md").read_text()


def test_every_baseline_file_has_a_row() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {row.file for row in ROWS}
