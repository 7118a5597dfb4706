"""Figures of added blocks at any layout equal the same figures computed plainly from one whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import workers
from gradients import parallel
from megatron_llamapro.config.schema import RecomputeConfig, RunConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.distributed import run_distributed

LAYOUTS = {
    "tp2": (2, parallel(tp=2)),
    "tp2 pp2 sequence parallel": (4, parallel(tp=2, pp=2, sp=True)),
    "pp2 virtual 2": (2, parallel(pp=2, vp=2, stage_layers=(2, 1, 2, 1))),
    "dp2": (2, parallel()),
}


def watched(config: RunConfig) -> RunConfig:
    """Record blocks at steps 2 and 4."""
    return replace(config, logging=replace(config.logging, diagnostics_interval=2))


def blocks(config: RunConfig, num_ranks: int) -> list[dict]:
    return run_distributed(workers.train, num_ranks, watched(config))[0].blocks


def test_figures_agree_with_the_run_and_its_checkpoint(run_config: Callable) -> None:
    """On one process: gradient norms add up to the run's, and distances are those of the saved tensors."""
    config = run_config(save="run")
    result = run_distributed(workers.train, 1, watched(config))[0]
    assert [(record["iteration"], record["layer"]) for record in result.blocks] == [(2, 2), (2, 5), (4, 2), (4, 5)]
    norms = {step: norm for step, _, norm, _ in result.figures}
    for step in (2, 4):
        of_blocks = [record["grad_norm"] for record in result.blocks if record["iteration"] == step]
        assert math.hypot(*of_blocks) == pytest.approx(norms[step], rel=1e-5)
    tensors = read_tensors(Path(config.checkpoint.save))
    for record in result.blocks[2:]:
        expected = distances(tensors, layer=record["layer"], source=record["layer"] - 1)
        assert (record["distance"], record["output_norm"]) == pytest.approx(expected, rel=1e-5)
        assert 0 < record["contribution"] < 1 and record["distance"] > 0


def distances(tensors: dict[str, torch.Tensor], *, layer: int, source: int) -> tuple[float, float]:
    """Return distance and output_norm from whole tensors; both blocks consist of seven matrices and two norms."""
    moved = copied = output = source_output = 0.0
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{layer}."):
            other = tensors[name.replace(f"layers.{layer}.", f"layers.{source}.")]
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                output, source_output = output + square(tensor), source_output + square(other)
            else:
                moved, copied = moved + square(tensor - other), copied + square(other)
    return math.sqrt(moved / copied), math.sqrt(output / source_output)


def square(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_do_not_depend_on_the_layout(layout: str, run_config: Callable) -> None:
    """Nor on recomputation. 1e-4 after four steps: another order of summation."""
    num_ranks, config = LAYOUTS[layout]
    one = blocks(run_config(save="one"), 1)
    recompute = RecomputeConfig("full", "uniform", 1)
    divided = blocks(replace(run_config(save="divided", parallel=config), recompute=recompute), num_ranks)
    for ours, expected in zip(divided, one, strict=True):
        assert ours.pop("kind") == expected.pop("kind") == "block"
        assert ours == pytest.approx(expected, rel=1e-4)


def test_an_identity_block_contributes_nothing(run_config: Callable) -> None:
    config = run_config(save="first", train_iters=1)
    result = run_distributed(workers.train, 1, replace(config, logging=replace(config.logging, diagnostics_interval=1)))
    for record in result[0].blocks:
        assert record["contribution"] == 0.0 and record["grad_norm"] > 0 and record["output_norm"] > 0


def test_an_added_block_knows_the_block_it_copied() -> None:
    """Two rounds: 4 layers, blocks at 2 and 5, then at 3 and 7."""
    plan = ExpansionPlan.unexpanded(4).expand([2, 5]).expand([3, 7])
    assert plan.added_layers == (2, 3, 6, 7)
    assert [plan.copied_from(layer) for layer in plan.added_layers] == [1, 2, 5, 6]
