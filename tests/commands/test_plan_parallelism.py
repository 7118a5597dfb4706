"""The command that divides a job's ranks: its output, its file, and a dry run of the best division."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.config.schema import RecomputeConfig

RUN = """
model: {checkpoint: not-there-yet}
data: {train: [{prefix: corpus}], seq_length: 32}
training: {train_iters: 10, micro_batch_size: 16, global_batch_size: 64, precision: fp32}
"""


@pytest.fixture
def arguments(tiny_llama: Callable[..., Path], tmp_path: Path) -> list:
    (tmp_path / "run.yaml").write_text(RUN)
    model = tiny_llama(num_hidden_layers=6)
    return ["--config", tmp_path / "run.yaml", "--hf_config", model, "--num_added_blocks", 2, "--world_size", 4]


def llamapro(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_llamapro", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_the_best_division_runs_dry(arguments: list, tmp_path: Path) -> None:
    """Nothing fits here without recomputation."""
    divided = ["--memory_gib", 0.0035, "--ranks_per_node", 1]
    result = llamapro("plan-parallelism", *arguments, *divided, "--output", tmp_path / "parallel.yaml")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2].startswith("TP x PP x DP") and " full " in lines[3]
    [best, *_] = json.loads(llamapro("plan-parallelism", *arguments, *divided, "--json").stdout)
    tensor, stages = (best["parallel"][f"{name}_model_parallel_size"] for name in ("tensor", "pipeline"))
    assert lines[3].startswith(f"{tensor} x {stages} x {best['data_parallel_size']} ")
    assert best["recompute"]["granularity"] == "full"
    dry = llamapro("dry-run", *arguments, "--config", tmp_path / "parallel.yaml")
    assert dry.returncode == 0, dry.stderr
    assert f"TP {tensor} x PP {stages} x DP {best['data_parallel_size']}" in dry.stdout and "recomputed" in dry.stdout
    assert best["gpu_hours"] == pytest.approx(4 * 80e9 / best["tokens_per_second"] / 3600)


def test_earlier_settings_in_the_file_are_replaced(arguments: list, tmp_path: Path) -> None:
    """Recomputation, virtual stages and a layer split of another division are removed."""
    before = {
        "parallel": {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_stage_layers": [2, 2, 2, 2],
        },
        "recompute": {"granularity": "selective", "modules": ["mlp"]},
    }
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({**yaml.safe_load(RUN), **before}))
    assert llamapro("plan-parallelism", *arguments, "--output", tmp_path / "parallel.yaml").returncode == 0
    both = parse_run_config(["--config", str(run), "--config", str(tmp_path / "parallel.yaml")])
    assert parse_run_config(["--config", str(run)]).recompute.modules == ("mlp",)
    assert both.recompute == RecomputeConfig() and both.parallel.virtual_pipeline_model_parallel_size is None
    assert both.parallel.pipeline_model_parallel_size == 1 and both.parallel.pipeline_stage_layers is None


BAD = {
    "nothing fits": (
        ["--memory_gib", 0.0001],
        "no division of 4 ranks fits into 0.0001 GiB per rank: the smallest needs 0.00155",
    ),
    "no memory": (["--memory_gib", 0], "--memory_gib is 0: it must be above 0"),
    "no number": (["--peak_tflops", "inf"], "argument --peak_tflops: 'inf': it must be finite"),
    "no such blocks": (["--model.trainable=[round_7]"], "model.trainable names 'round_7'"),
    "nowhere to write": (
        ["--output", "/nowhere/x.yaml"],
        "/nowhere/x.yaml cannot be written: the folder /nowhere does not",
    ),
    "a folder to write": (["--output", "/tmp"], "/tmp is a folder: name a file in it"),
    "no option": (["--efficency", 1], "unrecognized arguments: --efficency: did you mean --efficiency?"),
    "no ranks": (["--world_size", 0], "--world_size is 0: it must be above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, arguments: list) -> None:
    more, message = BAD[name]
    result = llamapro("plan-parallelism", *arguments, *more)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
