"""Compares the necessary cost of training a 7B with 8 added blocks with the counted cost of the program's own step.

python benchmarks/executed_work.py [--json FILE]

Runs on tensors without data (llamapro dry-run): it needs no GPU and no weights, gives the same figures on every run,
and takes half a minute. The exit code is 1 if a figure misses its target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.schema import (
    BlendEntry,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.hf_config import model_shape
from random_llama import SHAPES, hf_config

GIB, GFLOP = 2**30, 1e9
ADDED = (4, 9, 14, 19, 24, 29, 34, 39)
BASE = RunConfig(
    model=ModelConfig(checkpoint="llama-2-7b-pro"),
    data=DataConfig(train=(BlendEntry("corpus"),), seq_length=4096),
    training=TrainingConfig(train_iters=15900, micro_batch_size=1, global_batch_size=1024),
)
RECOMPUTED = replace(BASE, recompute=RecomputeConfig("full", "uniform", 1))
# The first stage ends before the first added block.
FROZEN_STAGE = replace(
    BASE, parallel=ParallelConfig(pipeline_model_parallel_size=4, pipeline_stage_layers=(4, 12, 12, 12))
)


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    counted: float
    must_be: float
    unit: str
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is at most the limit, or equals `must_be` to the digits that `must_be` has."""
        if self.at_most:
            return self.counted <= self.must_be
        digits = len(f"{self.must_be:g}".partition(".")[2])
        return round(self.counted, digits) == self.must_be

    def __str__(self) -> str:
        limit, verdict = "≤ " if self.at_most else "", "ok" if self.is_met else "**missed**"
        return f"| {self.what} | {self.counted:.2f} {self.unit} | {limit}{self.must_be:g} | {verdict} |"


def main() -> int:
    """Count, print the table, and return 0 if all figures are met."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args()
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    print("| counted | | must be | |\n|---|---|---|---|")
    figures = []
    for figure in figures_of_7b():
        figures.append(figure)
        print(figure, flush=True)
    if args.json:
        args.json.write_text(json.dumps([vars(figure) | {"is_met": figure.is_met} for figure in figures], indent=2))
    return 0 if all(figure.is_met for figure in figures) else 1


def run(config: RunConfig, world_size: int, rank: int):
    """Run one rank dry."""
    from megatron_llamapro.dry_run.run import dry_run

    plan = ExpansionPlan.unexpanded(32).expand(ADDED)
    model = DescribedModel.expanded(model_shape(hf_config(SHAPES["llama-2-7b"])), plan)
    return dry_run(config, model, world_size=world_size, rank=rank)


def figures_of_7b() -> Iterator[Figure]:
    """Yield every figure with its target, from arithmetic or a set limit."""
    from megatron_llamapro.dry_run.counting import Kind, Product

    alone, of_16 = run(BASE, 1, 0), run(BASE, 16, 0)

    def flops(report, wanted: Callable[[Product], bool]) -> float:
        return sum(n for product, n in report.counts.flops.items() if wanted(product)) / report.tokens / GFLOP

    def is_attention(product: Product) -> bool:
        return product.value.startswith("attention")

    yield Figure(
        "matrix products a token, without attention", flops(alone, lambda p: not is_attention(p)), 34.52, "GFLOP"
    )
    yield Figure("with causal attention counted once", flops(alone, lambda p: True), 38.28, "GFLOP")
    recomputed = run(RECOMPUTED, 1, 0)
    blocks = flops(alone, lambda p: p is Product.FORWARD) - 2 * 4096 * 32000 / GFLOP  # without the head
    again = flops(recomputed, lambda p: p is Product.RECOMPUTED)
    yield Figure("full recomputation: blocks run forward once more, of 40", again / blocks * 40, 36, "blocks")
    without = flops(recomputed, lambda p: "recomputed" not in p.value)
    yield Figure("full recomputation: everything else", without, 38.28, "GFLOP")
    yield Figure("weights, gradients, master weights, moments, DP 1", sum(alone.held_bytes.values()) / GIB, 39.7, "GiB")
    for kind in (Kind.MASTER, Kind.MOMENTS):
        share = alone.held_bytes[kind] / of_16.held_bytes[kind]
        yield Figure(f"{kind.value}: DP 1 over DP 16", share, 16, "times")
    yield Figure("peak, micro-batch 1, TP 1, DP 16", of_16.counts.peak_bytes / GIB, 41, "GiB", at_most=True)
    below, above = run(FROZEN_STAGE, 16, 0), run(FROZEN_STAGE, 16, 4)
    yield Figure("activations kept below the first trainable block", below.saved_bytes, 0, "bytes")
    yield Figure("gradients sent into a stage below it", above.message_bytes.get("gradients", 0), 0, "bytes")
    yield Figure("gradients held by that stage", below.held_bytes.get(Kind.GRADIENTS, 0), 0, "bytes")
    for what, parameter_bytes in (("reduce-scatter", 4), ("all-gather", 2)):
        sent = of_16.counts.sent_bytes["data", what] / of_16.stage_report.num_trainable
        yield Figure(f"{what} a step, of a trainable parameter", sent, parameter_bytes, "bytes")
    everything = sum(size for (group, _), size in of_16.counts.sent_bytes.items() if group == "data")
    rest = everything / of_16.stage_report.num_trainable
    yield Figure("all that replicas exchange, of a trainable parameter", rest, 6, "bytes")


if __name__ == "__main__":
    run_command(main)
