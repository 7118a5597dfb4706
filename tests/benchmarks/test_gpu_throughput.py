"""The GPU benchmark in miniature, on any device. Its numbers mean nothing at this size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu_throughput.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_variant_reports_its_figures(tmp_path: Path) -> None:
    variants = "added,everything,transformers_recomputed"
    result = run("--tiny", "--steps", 1, "--variants", variants, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == set(variants.split(","))
    for found in figures.values():
        assert "failure" not in found, found
        assert found["tokens_per_second"] > 0 and found["tflops"] > 0 and found["peak_gib"] > 0
    assert figures["everything"]["tflops"] / figures["everything"]["tokens_per_second"] > (
        figures["added"]["tflops"] / figures["added"]["tokens_per_second"]
    )


def test_an_unknown_variant_is_refused() -> None:
    result = run("--tiny", "--variants", "all")
    assert result.returncode == 2 and "--variants names all" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_reported() -> None:
    result = run("--variants", "added", "--steps", 1)
    assert "no CUDA device is available" in result.stdout
