"""Counts the cost of each baseline of examples/baselines on a 7B in the program's own step.

python benchmarks/baselines.py

Runs on tensors without data (llamapro dry-run): it needs no GPU and no weights, gives the same figures on every run,
and takes half a minute. docs/baselines.md has its table.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from executed_work import ADDED, BASE, GFLOP, GIB
from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.io import dump_yaml, parse_run_config
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.hf_config import model_shape
from random_llama import SHAPES, hf_config

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "baselines"


@dataclass(frozen=True)
class Row:
    """One baseline on one model."""

    name: str
    file: str
    is_expanded: bool = True
    overrides: tuple[str, ...] = ()


ROWS = (
    Row("everything", "everything.yaml", is_expanded=False),
    Row("added blocks (LLaMA Pro)", "added_blocks.yaml"),
    Row("zero-initialised projections only", "projections.yaml"),
    Row("low-rank added blocks, rank 64", "low_rank_blocks.yaml"),
    Row("LoRA, rank 768", "lora.yaml", is_expanded=False),
    Row("LoRA, rank 16", "lora.yaml", is_expanded=False, overrides=("--lora.rank=16",)),
)
COLUMNS = (
    "",
    "file",
    "blocks",
    "trainable parameters",
    "GFLOP a token",
    "forward",
    "input gradients",
    "weight gradients",
    "peak, GiB",
)
HEADING = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> int:
    """Count, and print the table."""
    CommandParser(description=__doc__).parse_args()
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    print(HEADING)
    for row in ROWS:
        print(line(row), flush=True)
    return 0


def line(row: Row) -> str:
    """Return a baseline's row: 16 replicas, TP 1, PP 1, micro-batch 1 x 4,096 tokens, bfloat16."""
    from megatron_llamapro.dry_run.counting import Product
    from megatron_llamapro.dry_run.run import dry_run

    original = ExpansionPlan.unexpanded(32)
    plan = original.expand(ADDED) if row.is_expanded else original
    model = DescribedModel.expanded(model_shape(hf_config(SHAPES["llama-2-7b"])), plan)
    report = dry_run(config_of(row), model, world_size=16, rank=0)

    def flops(*products: Product) -> str:
        return f"{sum(report.counts.flops[product] for product in products) / report.tokens / GFLOP:.2f}"

    cells = (
        row.name,
        f"[{row.file}](../examples/baselines/{row.file})",
        plan.num_layers,
        f"{report.stage_report.num_trainable:,}",
        flops(*Product),
        flops(Product.FORWARD, Product.ATTENTION_FORWARD),
        flops(Product.INPUT_GRADIENT, Product.ATTENTION_BACKWARD),
        flops(Product.WEIGHT_GRADIENT),
        f"{report.counts.peak_bytes / GIB:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def config_of(row: Row) -> RunConfig:
    """Return the 7B's run with the baseline's file as a further --config, as pretrain reads them."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.yaml"
        run.write_text(dump_yaml(BASE))
        return parse_run_config([f"--config={run}", f"--config={FOLDER / row.file}", *row.overrides])


if __name__ == "__main__":
    run_command(main)
