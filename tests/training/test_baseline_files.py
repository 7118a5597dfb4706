"""docs/baselines.md: every baseline's file, combined with a recipe, is set up without an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import workers
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.testing.distributed import run_distributed

RECIPE = "examples/llama2_7b_pro/run.yaml"
# The tiny model that each baseline starts from, by the blocks in the page's table.
STARTS = {
    "added_blocks.yaml": "expanded_megatron",
    "everything.yaml": "original_megatron",
    "lora.yaml": "original_megatron",
    "low_rank_blocks.yaml": "expanded_megatron",
    "projections.yaml": "expanded_megatron",
}


def test_every_baseline_can_be_combined_with_a_recipe(
    models: Callable, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    here = (
        f"--data.train=[{{prefix: {token_files[0]}}}]",
        "--data.valid={}",
        "--training.eval_interval=0",
        "--data.seq_length=64",
        "--training.train_iters=2",
        "--training.global_batch_size=4",
        f"--checkpoint.save={tmp_path}/save",
    )
    configs = [
        parse_run_config(
            [
                *("--config", RECIPE, "--config", f"examples/baselines/{name}"),
                *here,
                f"--model.checkpoint={getattr(models(dtype='bfloat16'), start)}",
            ]
        )
        for name, start in STARTS.items()
    ]
    assert {path.name for path in Path("examples/baselines").iterdir()} == set(STARTS)
    [answers] = run_distributed(workers.set_up_errors, 1, configs)
    assert dict(zip(STARTS, answers, strict=True)) == dict.fromkeys(STARTS, "no error")
