"""Tokens/s, TFLOP/s and peak memory of training a 7B with 8 added blocks on one GPU, with random bfloat16 weights.

python benchmarks/gpu_throughput.py [--micro_batch_size 1] [--steps 5] [--variants added,everything] [--json FILE]
python benchmarks/gpu_throughput.py --tiny      a quick check with a model of a megabyte, also on a CPU

Every variant runs in its own process: the program's model, freezing, DDP, optimizer and step with two micro-batches,
or the same step by transformers (gpu_peer.py). A variant that does not fit gets a line that says so.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import (
    BlendEntry,
    DataConfig,
    ModelConfig,
    RecomputeConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_llamapro.expansion.plan import ExpansionPlan, placed_positions
from megatron_llamapro.families.hf_config import model_shape
from random_llama import SHAPES, LlamaShape, hf_config

_WARM_UP, _MICROBATCHES = 3, 2
TINY = LlamaShape(64, 96, 4, 4, 2, 128, 64)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    title: str
    trainable: str = "added_blocks"
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    by_transformers: bool = False


VARIANTS = {
    "added": Variant("added blocks train"),
    "recomputed": Variant("added blocks train, full recomputation", recompute=RecomputeConfig("full", "uniform", 1)),
    "everything": Variant("everything trains", trainable="everything"),
    "everything_recomputed": Variant(
        "everything trains, full recomputation", "everything", RecomputeConfig("full", "uniform", 1)
    ),
    "transformers": Variant("transformers, added blocks train", by_transformers=True),
    "transformers_recomputed": Variant(
        "transformers, added blocks train, gradient checkpointing",
        recompute=RecomputeConfig("full", "uniform", 1),
        by_transformers=True,
    ),
}


def main() -> int:
    """Measure each variant in its own process, and print the table."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--micro_batch_size", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="number of timed steps, after three others")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--worker", choices=list(VARIANTS), help="measure this one and print JSON (internal)")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(VARIANTS[args.worker], args)))
        return 0
    unknown = set(args.variants.split(",")) - set(VARIANTS)
    if unknown:
        raise ConfigError(f"--variants names {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    results = {}
    print("| | tokens/s | TFLOP/s | of a matrix product | peak, GiB |\n|---|---|---|---|---|")
    for name in args.variants.split(","):
        results[name] = _apart(name)
        print(_row(VARIANTS[name], results[name]), flush=True)
    for what, value in next(iter(results.values())).get("machine", {}).items():
        print(f"- {what}: {value}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return 0


def _apart(name: str) -> dict:
    """Return the variant's figures, or how its process failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"failure": "does not fit" if "out of memory" in done.stderr else lines[-1]}


def _row(variant: Variant, result: dict) -> str:
    if "failure" in result:
        return f"| {variant.title} | {result['failure']} | | | |"
    return (
        f"| {variant.title} | {result['tokens_per_second']:,.0f} | {result['tflops']:.1f} | "
        f"{result['tflops'] / result['product_tflops']:.0%} | {result['peak_gib']:.2f} |"
    )


def measure(variant: Variant, args) -> dict:
    """Return medians over the timed steps, on this process's device."""
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.distributed import start_world, stop_world
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    import torch

    on_gpu = torch.cuda.is_available()
    if not (on_gpu or args.tiny):
        raise ConfigError("no CUDA device is available: use --tiny for a quick check")
    start_world()
    try:
        shape = TINY if args.tiny else SHAPES["llama-2-7b"]
        model, config = _model(shape), _config(variant, args, on_gpu=on_gpu)
        step = _peer_step(config, model, shape) if variant.by_transformers else _step(config, model)
        seconds = statistics.median([_timed(step) for _ in range(_WARM_UP + args.steps)][_WARM_UP:])
        return _figures(config, model, seconds, on_gpu=on_gpu, size=256 if args.tiny else 8192)
    finally:
        stop_world()


def _model(shape: LlamaShape) -> DescribedModel:
    layers = shape.num_hidden_layers
    plan = ExpansionPlan.unexpanded(layers).expand(placed_positions(layers, layers // 4))
    return DescribedModel.expanded(model_shape(hf_config(shape)), plan)


def _config(variant: Variant, args, *, on_gpu: bool) -> RunConfig:
    return RunConfig(
        model=ModelConfig(checkpoint="none", trainable=(variant.trainable,)),
        data=DataConfig(train=(BlendEntry("none"),), seq_length=32 if args.tiny else 4096),
        training=TrainingConfig(
            train_iters=1000,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=_MICROBATCHES * args.micro_batch_size,
            precision="bf16" if on_gpu else "fp32",
        ),
        recompute=variant.recompute,
    )


def _step(config: RunConfig, model: DescribedModel) -> Callable[[], object]:
    """Return the program's own step."""
    import torch

    from megatron_llamapro.training.machine import build_machine
    from megatron_llamapro.training.step import train_step

    machine = build_machine(config, model.shape, model.plan, load=_random_weights)
    tokens = _tokens(config, model)
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones(tokens.shape),
        "position_ids": torch.arange(tokens.shape[1]).expand(tokens.shape),
    }
    return lambda: train_step(
        machine,
        [iter([batch] * _MICROBATCHES)],
        num_microbatches=_MICROBATCHES,
        micro_batch_size=tokens.shape[0],
        seq_length=tokens.shape[1],
    )


def _peer_step(config: RunConfig, model: DescribedModel, shape: LlamaShape) -> Callable[[], object]:
    import torch

    from gpu_peer import make_step

    return make_step(
        hf_config(shape.with_layers(model.shape.num_layers)),
        model.plan.added_layers,
        _tokens(config, model).to(torch.cuda.current_device()),
        num_microbatches=_MICROBATCHES,
        checkpointing=config.recompute.granularity == "full",
    )


def _tokens(config: RunConfig, model: DescribedModel):
    """Return random tokens [b, s]."""
    import torch

    return torch.randint(model.shape.vocab_size, (config.training.micro_batch_size, config.data.seq_length))


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of `work`, by CUDA's events on a GPU."""
    import torch

    if not torch.cuda.is_available():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _random_weights(models: list) -> None:
    import torch

    with torch.no_grad():
        for parameter in (parameter for model in models for parameter in model.parameters()):
            parameter.normal_(std=0.02)


def _figures(config: RunConfig, model: DescribedModel, seconds: float, *, on_gpu: bool, size: int) -> dict:
    import torch

    from megatron_llamapro.training.report import peak_memory_gib, work_per_token

    tokens = config.training.global_batch_size * config.data.seq_length
    work = work_per_token(config, model.shape, model.plan).total
    peak_gib = peak_memory_gib()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(size, size, dtype=dtype, device=torch.cuda.current_device()) for _ in range(2))
    product = statistics.median([_timed(lambda: left @ right) for _ in range(10)][3:])
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": work * tokens / seconds / 1e12,
        "product_tflops": 2 * size**3 / product / 1e12,
        "peak_gib": peak_gib,
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
            "versions": f"torch {torch.__version__}, python {platform.python_version()}",
            "micro-batch": f"{config.training.micro_batch_size} x {config.data.seq_length} tokens",
            "TFLOP/s": "work that the training needs, without skipped frozen work and without recomputation",
        },
    }


if __name__ == "__main__":
    run_command(main)
