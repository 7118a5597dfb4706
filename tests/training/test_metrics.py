"""Figures on the console, and the path of the metrics file."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from megatron_llamapro.config.schema import LoggingConfig
from megatron_llamapro.training.metrics import ConsoleWriter, metrics_path

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


def test_a_penalty_stands_beside_the_loss(capsys: pytest.CaptureFixture) -> None:
    ConsoleWriter(train_iters=100).write({**STEP, "penalty": 0.0123})
    assert "│ loss  1.5000 │ penalty 1.23e-02 │ grad norm" in capsys.readouterr().out


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


def test_output_on_a_full_disk_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    output = open("/dev/full", "w")  # noqa: SIM115 (closing it is a part of the test)
    monkeypatch.setattr(sys, "stdout", output)
    for number in range(1000):  # more than any buffer holds
        ConsoleWriter(train_iters=1000).write({**STEP, "iteration": number})
    with pytest.raises(OSError, match="No space left"):  # the buffered rest
        output.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "no update: loss nan, grad norm inf; in a row: 2, skipped so far: 3"),
        ({"tokens": 0}, "no update: none of its tokens has a loss; in a row: 2, skipped so far: 3"),
        ({"outcome": "left out"}, "left out by training.skip_iterations; skipped so far: 3"),
    ],
)
def test_a_step_without_an_update_is_reported(
    fields: dict, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ConsoleWriter(train_iters=100).write({**SKIP, **fields})
    assert capsys.readouterr().out == f"step   7/100 │ {text}\n"


def test_the_metrics_file_lies_beside_the_checkpoints_by_default() -> None:
    assert metrics_path(LoggingConfig(), save="s") == Path("s/metrics.jsonl")
    assert metrics_path(LoggingConfig(), save=None) == Path("metrics.jsonl")
    assert metrics_path(LoggingConfig(metrics_file="m"), save="s") == Path("m")
