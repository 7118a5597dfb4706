"""The layer split: the command's output, its file, and a run that reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.planning.job import KINDS

RUN = """
model: {checkpoint: not-there-yet}
data: {train: [{prefix: corpus}], seq_length: 32}
training: {train_iters: 10, micro_batch_size: 1, global_batch_size: 32, precision: fp32}
parallel: {pipeline_model_parallel_size: 2}
"""


@pytest.fixture
def arguments(tiny_llama: Callable[..., Path], tmp_path: Path) -> list:
    """Return arguments for a tiny model whose last two blocks are added: the first stage has no backward pass."""
    (tmp_path / "run.yaml").write_text(RUN)
    model = tiny_llama(num_hidden_layers=6)
    return ["--config", tmp_path / "run.yaml", "--hf_config", model, "--num_added_blocks", 2, "--placement", "suffix"]


def plan_pipeline(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_llamapro", "plan-pipeline", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_run_reads_the_written_layout(arguments: list, tmp_path: Path) -> None:
    result = plan_pipeline(*arguments, "--world_size", 4, "--output", tmp_path / "parallel.yaml")
    assert result.returncode == 0, result.stderr
    assert "even split: 4, 4" in result.stdout and "no split is faster" in result.stdout
    run = parse_run_config(["--config", str(tmp_path / "run.yaml"), "--config", str(tmp_path / "parallel.yaml")])
    assert run.parallel.pipeline_stage_layers is not None and run.parallel.pipeline_stage_layers[0] > 4
    found = json.loads(plan_pipeline(*arguments, "--world_size", 4, "--json").stdout)
    assert found["best"]["counts"] == list(run.parallel.pipeline_stage_layers)
    assert found["best"]["seconds"] < found["even"]["seconds"]
    assert found["best"]["gpu_hours"] == pytest.approx(4 * 80e9 / found["best"]["tokens_per_second"] / 3600)


def test_a_plan_uses_measured_times(arguments: list, tmp_path: Path) -> None:
    """Every kind of block is timed, and the plan uses the times."""
    times = tmp_path / "times.json"
    result = plan_pipeline(*arguments, "--world_size", 1, "--calibrate", times)
    assert result.returncode == 0, result.stderr
    measured = json.loads(times.read_text())
    assert set(measured) == set(KINDS) and all(kind["forward"] > 0 for kind in measured.values())
    assert measured["below"]["backward"] == 0 < measured["frozen"]["backward"]
    planned = plan_pipeline(*arguments, "--world_size", 2, "--calibration", times, "--json")
    [even, best] = (json.loads(planned.stdout)[name] for name in ("even", "best"))
    assert sum(best["counts"]) == 8 and best["seconds"] <= even["seconds"]
    total = sum(even["stage_forward"]) + sum(even["stage_backward"])
    assert total == pytest.approx(
        sum(sum(measured[kind].values()) for kind in ["below"] * 6 + ["trainable"] * 2 + ["embedding", "head"])
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--world_size", 3], "3 ranks cannot be divided"),
        (["--world_size", 4, "--parallel.pipeline_model_parallel_size", 1], "there is one stage, so nothing to split"),
        (["--world_size", 4, "--memory_gib", 1e-6], "no split fits"),
        (["--world_size", 4, "--calibration", "run.yaml"], "run.yaml"),
        (["--world_size", 4, "--peak_tflops", -1], "--peak_tflops is -1: it must be above 0"),
        (["--world_size", 4, "--efficiency", 40], "--efficiency is 40: it must be at most 1"),
        (["--world_size", 4, "--positions", "1"], "--positions already places"),
    ],
)
def test_bad_input_is_one_line(more: list, message: str, arguments: list) -> None:
    result = plan_pipeline(*arguments, *more)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
