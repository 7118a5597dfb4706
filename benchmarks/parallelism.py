"""Plans 8 to 1,024 GPUs of 80 GB as llamapro plan-parallelism does, for LLaMA-2 with a block added after every fourth.

python benchmarks/parallelism.py

The batch is the paper's: 1,024 x 4,096 tokens, in micro-batches of one. It takes seconds and prints the table of
docs/cluster.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.commands.plan_parallelism import name
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.expansion.plan import ExpansionPlan, placed_positions
from megatron_llamapro.families.hf_config import model_shape
from megatron_llamapro.planning.job import EFFICIENCY, PEAK_TFLOPS, run_cost
from megatron_llamapro.planning.network import Network
from megatron_llamapro.planning.parallelism import Cluster, best_parallelisms
from random_llama import SHAPES, LlamaShape, hf_config
from recipes import GIB, ROOT

MEMORY_GIB = 70
NUM_GPUS = (8, 16, 64, 1024)
MODELS = {
    "7B": SHAPES["llama-2-7b"],
    "13B": SHAPES["llama-2-13b"],
    "70B": LlamaShape(8192, 28672, 80, 64, 8, 32000, 4096),
}


def main() -> int:
    """Plan, and print one row per job."""
    CommandParser(description=__doc__).parse_args()
    for row in rows():
        print(row, flush=True)
    return 0


def rows() -> Iterator[str]:
    """Yield the lines of the Markdown table."""
    names = ("model", "GPUs", "TP × PP × DP", "recompute", "layers a stage", "GiB a GPU", "s a step", "tokens/s a GPU")
    yield f"| {' | '.join((*names, 'MFU', 'GPU-hours'))} |"
    yield "|---" * 10 + "|"
    for size in MODELS:
        for num_gpus in NUM_GPUS:
            yield row(size, num_gpus)


def row(size: str, num_gpus: int) -> str:
    """Return one job's row."""
    recipe = str(ROOT / "examples" / "llama2_7b_pro" / "run.yaml")
    config, model = parse_run_config(["--config", recipe, "--training.micro_batch_size=1"]), expanded(size)
    cluster = Cluster(num_gpus, PEAK_TFLOPS * 1e12 * EFFICIENCY, MEMORY_GIB * GIB, Network())
    [best] = best_parallelisms(config, model, cluster, at_most=1)
    whole = run_cost(best.job, best.seconds)
    counts = sorted(set(best.plan.counts))
    layers = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"| {size} + {len(model.plan.added_layers)} | {num_gpus:,} | {name(best).replace('x', '×')} | "
        f"{best.config.recompute.granularity or 'no'} | {layers} | {best.memory_bytes / GIB:.0f} | "
        f"{best.seconds:.1f} | {whole.tokens_per_second / num_gpus:,.0f} | {whole.model_flops_utilization:.0%} | "
        f"{whole.gpu_hours:,.0f} |"
    )


def expanded(size: str) -> DescribedModel:
    """Return LLaMA-2 of a size with a block added after every fourth."""
    original = model_shape(hf_config(MODELS[size]))
    plan = ExpansionPlan.unexpanded(original.num_layers)
    plan = plan.expand(placed_positions(original.num_layers, original.num_layers // 4))
    return DescribedModel.expanded(original, plan)


if __name__ == "__main__":
    run_command(main)
