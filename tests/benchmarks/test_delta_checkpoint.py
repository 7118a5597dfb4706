"""The benchmark of delta checkpoints runs on a tiny model. Its seconds mean nothing at this size; its bytes do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_delta_is_smaller_than_a_full_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/delta_checkpoint.py", "--model", "tiny", "--saves", "1"]
    result = subprocess.run([*command, "--json", str(tmp_path / "saves.json")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [full], [delta], [beside] = json.loads((tmp_path / "saves.json").read_text()).values()
    assert (full["delta"], delta["delta"], beside["asynchronous"]) == (False, True, True)
    assert delta["num_bytes"] < 0.7 * full["num_bytes"]
    assert abs(beside["num_bytes"] - delta["num_bytes"]) < 1000  # run.yaml records whether the save was asynchronous
