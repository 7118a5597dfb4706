"""The benchmark of planned splits runs; its numbers say nothing at this size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_tiny(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/pipeline_split.py", "--tiny", "--json", str(tmp_path / "split.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| planned | (" in result.stdout
    found = json.loads((tmp_path / "split.json").read_text())
    assert found["predicted"] > 1 and all(len(steps) == 2 for steps in found["seconds"].values())
