"""Where figures go, and that a run that goes on keeps one clean record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_llamapro.config.schema import LoggingConfig
from megatron_llamapro.training.metrics import ConsoleWriter, JsonlWriter, TensorBoardWriter, metrics_path

STEP = {
    "kind": "train",
    "iteration": 7,
    "loss": 1.5,
    "grad_norm": 0.25,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.6,
    "tflops_per_second": 1.25,
    "memory_gib": 3.5,
}
BLOCK = {
    "kind": "block",
    "iteration": 7,
    "layer": 4,
    "contribution": 0.0123,
    "grad_norm": 0.5,
    "distance": 1e-4,
    "output_norm": 0.02,
}
SKIP = {
    "kind": "skip",
    "iteration": 7,
    "outcome": "skipped",
    "loss": math.nan,
    "grad_norm": math.inf,
    "tokens": 128,
    "skipped_steps": 3,
    "skipped_in_a_row": 2,
}
HELD_OUT = {"kind": "eval", "iteration": 7, "name": "cpp", "loss": 1.75, "tokens": 10}


def test_console_lines_are_aligned(capsys: pytest.CaptureFixture) -> None:
    writer = ConsoleWriter(train_iters=100)
    writer.write(STEP)
    writer.write({**STEP, "iteration": 100, "tokens_per_second": 5.0})
    writer.write(HELD_OUT)
    writer.write(BLOCK)
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert [i for i, c in enumerate(first) if c == "│"] == [i for i, c in enumerate(second) if c == "│"]
    assert first.startswith("step   7/100 │ loss  1.5000") and "12,346 tokens/s" in first
    assert third == "step   7/100 │ held-out cpp: loss 1.7500"
    assert fourth.startswith("step   7/100 │ block   4 │ adds 1.23e-02 of the stream")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "no update: loss nan, grad norm inf; in a row: 2, skipped so far: 3"),
        ({"tokens": 0}, "no update: none of its tokens has loss; in a row: 2, skipped so far: 3"),
        ({"outcome": "left out"}, "left out, as training.skip_iterations says; skipped so far: 3"),
    ],
)
def test_a_step_without_an_update(fields: dict, text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ConsoleWriter(train_iters=100).write({**SKIP, **fields})
    assert capsys.readouterr().out == f"step   7/100 │ {text}\n"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a" / "metrics.jsonl"
    writer = JsonlWriter(path, resumed_at=0)
    for step in range(1, 6):
        writer.write({**STEP, "iteration": step})
    with path.open("a") as file:
        file.write('{"kind": "tra')  # killed while writing
    JsonlWriter(path, resumed_at=3).write({**STEP, "iteration": 4})
    assert steps(path) == [1, 2, 3, 4]
    JsonlWriter(path, resumed_at=0)
    assert steps(path) == []


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(str(tmp_path))
    writer.write({"kind": "run", "iteration": 0})
    writer.write(STEP)
    writer.write(HELD_OUT)
    writer.write(BLOCK)
    writer.write(SKIP)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("block 4/output_norm")[0].value == pytest.approx(0.02)
    assert events.Scalars("train/skipped_steps")[0].value == 3
    assert events.Scalars("train/loss")[0].value == 1.5 and events.Scalars("eval/cpp")[0].step == 7


def test_where_the_record_goes() -> None:
    assert metrics_path(LoggingConfig(), save="s") == Path("s/metrics.jsonl")
    assert metrics_path(LoggingConfig(), save=None) == Path("metrics.jsonl")
    assert metrics_path(LoggingConfig(metrics_file="m"), save="s") == Path("m")
