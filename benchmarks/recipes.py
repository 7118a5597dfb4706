"""Predicts the needs of the recipes in examples/: memory per GPU by dry run, GPU-hours by the cost model.

python benchmarks/recipes.py

Runs on tensors without data: it needs no GPU and no weights, and takes a minute. Each recipe's header has its lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.expansion.plan import ExpansionPlan, placed_positions
from megatron_llamapro.families.hf_config import model_shape

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_WIDTHS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA2_7B = {
    **_LLAMA,
    **_WIDTHS,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
HF_CONFIGS = {
    "llama2_7b_pro": _LLAMA2_7B,
    "llama2_7b_pro_instruct": _LLAMA2_7B,
    "llama3_8b_pro": {
        **_LLAMA,
        **_WIDTHS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "mistral_7b_pro": {
        **_LLAMA,
        **_WIDTHS,
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
}


@dataclass(frozen=True)
class Recipe:
    """One recipe on a number of GPUs."""

    name: str
    num_gpus: int = 16
    num_added: int = 8

    @property
    def path(self) -> Path:
        return ROOT / "examples" / self.name / "run.yaml"


RECIPES = (
    Recipe("llama2_7b_pro"),
    Recipe("llama2_7b_pro", 8),
    Recipe("llama2_7b_pro_instruct"),
    Recipe("llama2_7b_pro_instruct", 8),
    Recipe("llama3_8b_pro"),
    Recipe("mistral_7b_pro"),
)


def main() -> int:
    """Count, and print one line per recipe."""
    CommandParser(description=__doc__).parse_args()
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    for recipe in RECIPES:
        print(f"{recipe.path.relative_to(ROOT)}: {figures(recipe)}", flush=True)
    return 0


def figures(recipe: Recipe) -> str:
    """Return memory and time, as in the recipe's header."""
    from megatron_llamapro.dry_run.run import distinct_ranks, dry_run
    from megatron_llamapro.planning.job import EFFICIENCY, PEAK_TFLOPS
    from megatron_llamapro.training.report import work_per_token

    config = parse_run_config(["--config", str(recipe.path)])
    original = model_shape(HF_CONFIGS[recipe.name])
    plan = ExpansionPlan.unexpanded(original.num_layers)
    plan = plan.expand(placed_positions(original.num_layers, recipe.num_added))
    model = DescribedModel.expanded(original, plan)
    world_size = recipe.num_gpus
    ranks = distinct_ranks(config, world_size)
    peak = max(dry_run(config, model, world_size=world_size, rank=rank).counts.peak_bytes for rank in ranks)
    tokens = config.training.train_iters * config.training.global_batch_size * config.data.seq_length
    hours = tokens * work_per_token(config, model.shape, plan).total / (PEAK_TFLOPS * 1e12 * EFFICIENCY) / 3600
    return (
        f"on {world_size} GPUs {peak / GIB:.1f} GiB each at the peak (dry run); {hours:,.0f} GPU-hours for "
        f"{tokens / 1e9:.1f} B tokens at 40 % of an H100"
    )


if __name__ == "__main__":
    run_command(main)
