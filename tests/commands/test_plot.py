"""Plots of runs: the command reads the metrics that training writes, and refuses other files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.commands.plot import labels_of, read_series
from megatron_llamapro.config.errors import DataError


def record(step: int) -> str:
    values = {"loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 10.0}
    return json.dumps({"kind": "train", "iteration": step, **values})


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    lines = [json.dumps({"kind": "run", "iteration": 0}), record(1), record(2)]
    for layer in (2, 5):
        figures = {"contribution": 0.1, "grad_norm": 1.0, "distance": 0.0, "output_norm": 0.2}
        lines.append(json.dumps({"kind": "block", "iteration": 2, "layer": layer, **figures}))
    lines.append(json.dumps({"kind": "eval", "iteration": 2, "name": "cpp", "loss": 1.5, "tokens": 9}))
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_series_hold_losses_and_block_figures(metrics: Path) -> None:
    series = read_series(metrics)
    assert series["training loss, nats per token", ""] == [(1, 2.0), (2, 1.0)]
    assert series["held-out cpp", ""] == [(2, 1.5)]
    assert series["contribution of a block to the stream", "block 5"] == [(2, 0.1)]


def test_only_a_penalised_run_has_a_panel_of_its_penalty(metrics: Path) -> None:
    panel = ("penalty on added blocks, before its weight", "")
    assert panel not in read_series(metrics)
    metrics.write_text(metrics.read_text() + json.dumps({**json.loads(record(3)), "penalty": 0.01}) + "\n")
    assert read_series(metrics)[panel] == [(3, 0.01)]


def test_a_figure_that_is_not_finite_is_a_gap(metrics: Path, tmp_path: Path) -> None:
    """A last line cut by a kill is ignored."""
    metrics.write_text(metrics.read_text() + record(3).replace("1.0", "null") + "\n" + record(4)[:20])
    series = read_series(metrics)
    assert [step for step, _ in series["training loss, nats per token", ""]] == [1, 2, 3]
    assert math.isnan(series["gradient norm", ""][2][1])
    assert run("--input", metrics, "--output", tmp_path / "plot.png").returncode == 0


def test_files_of_one_name_are_labelled_by_their_folders() -> None:
    assert labels_of([Path("a/metrics.jsonl"), Path("b/metrics.jsonl")]) == ["a", "b"]
    assert labels_of([Path("x.jsonl"), Path("y.jsonl")]) == ["x", "y"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_llamapro", "plot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_png_is_drawn_and_not_overwritten(metrics: Path, tmp_path: Path) -> None:
    output = tmp_path / "plot.png"
    assert run("--input", metrics, metrics, "--label", "one", "two", "--output", output).returncode == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    again = run("--input", metrics, "--output", output)
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_run_folders_are_read_and_an_output_without_an_ending_is_a_png(metrics: Path, tmp_path: Path) -> None:
    """The printed path is the written one."""
    done = run("--input", tmp_path, tmp_path, "--output", tmp_path / "plot")
    assert done.returncode == 2 and "runs have the same name" in done.stderr
    done = run("--input", tmp_path, "--output", tmp_path / "plot")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/plot.png\n"), done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = run("--input", tmp_path, "--output", tmp_path / "plot")
    assert again.returncode == 2 and f"{tmp_path}/plot.png exists" in again.stderr
    for output, message in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "no" / "x.png", "does not exist"),
    ):
        done = run("--input", metrics, "--output", output, "--overwrite")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"), [("", "no steps yet"), ("{", "line 1: not a metrics record"), ("[]", "line 1")]
)
def test_a_file_without_metrics_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_series(tmp_path / "m.jsonl")


def test_a_wrong_format_is_one_line(metrics: Path, tmp_path: Path) -> None:
    result = run("--input", metrics, "--output", tmp_path / "plot.xyz")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
