"""Find the split of the layers over pipeline stages with the least step time, and compare it with the even split.

llamapro plan-pipeline --config run.yaml --world_size 16 --parallel.pipeline_model_parallel_size 4
    [--memory_gib 80] [--output parallel.yaml] [--json]
llamapro plan-pipeline --config run.yaml --world_size 1 --calibrate times.json     time the blocks on this machine

The model need not be converted yet: --hf_config DIR --num_added_blocks N. Any field of the configuration can be
overridden by its dotted name, as in train. docs/planning.md lists the assumptions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_llamapro.checkpoint.description import DescribedModel, check_fits, describe_model
from megatron_llamapro.commands.options import (
    add_duration_options,
    add_job_options,
    check_duration_options,
    read_expansion_options,
)
from megatron_llamapro.config.command import CommandParser, check_positive
from megatron_llamapro.config.errors import ConfigError, PipelinePlanError
from megatron_llamapro.config.files import check_can_hold, write_atomically
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.config.pipeline_stages import draw
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import GIB
from megatron_llamapro.planning.job import Job, job_of, run_cost, time_from_calibration
from megatron_llamapro.planning.splits import Plan, best_plan, even_plan
from megatron_llamapro.runtime.upstream import import_megatron


def main(arguments: Sequence[str]) -> int:
    """Read the options, then plan, or measure the blocks."""
    parser = CommandParser(prog="llamapro plan-pipeline", description=__doc__)
    add_job_options(parser)
    add_duration_options(parser)
    parser.add_argument("--memory_gib", type=float, metavar="GIB", help="memory limit of a rank (default: none)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="block times that --calibrate measured")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure block times, write them and exit")
    args, run_args = parser.parse_own_args(arguments)
    config, expansion = parse_run_config(run_args), read_expansion_options(parser, args)
    check_duration_options(args)
    check_positive(args, "memory_gib")
    check_can_hold(args.calibrate)
    model = describe_model(Path(config.model.checkpoint), hf_config=args.hf_config, expansion=expansion)
    if args.calibrate:
        _calibrate(config, model, args.calibrate)
    else:
        _plan(config, model, args)
    return 0


def _plan(config: RunConfig, model: DescribedModel, args: argparse.Namespace) -> None:
    """Print the even split and the best one, and write the layout if asked."""
    job = _job(config, model, args)
    even, best = even_plan(job), best_plan(job)
    if args.json:
        figures = {
            name: {**vars(plan), **vars(run_cost(job, plan.seconds, peak_tflops=args.peak_tflops, tokens=args.tokens))}
            for name, plan in (("even", even), ("best", best))
        }
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(_lines(model, job, even, best, args)))
    if args.output:
        layout = {
            "pipeline_model_parallel_size": job.num_stages,
            **({"virtual_pipeline_model_parallel_size": job.num_chunks} if job.num_chunks > 1 else {}),
            "pipeline_stage_layers": list(best.counts),
        }
        write_atomically(args.output, yaml.safe_dump({"parallel": layout}, sort_keys=False))
        if not args.json:
            print(f"{args.output}: pass it to the run as another --config")


def _job(config: RunConfig, model: DescribedModel, args: argparse.Namespace) -> Job:
    check_fits(config, model.shape, model.plan)
    if args.calibration and config.lora.rank is not None:
        raise ConfigError("a calibration times whole blocks, not adapters: with lora, leave out --calibration")
    if config.parallel.pipeline_model_parallel_size < 2:
        raise ConfigError("there is one stage, so nothing to split: set --parallel.pipeline_model_parallel_size")
    job = job_of(
        config,
        model.shape,
        model.plan,
        world_size=args.world_size,
        flops_per_second=args.peak_tflops * 1e12 * args.efficiency,
        memory_bytes=args.memory_gib * GIB if args.memory_gib else float("inf"),
    )
    if not args.calibration:
        return job
    measured = time_from_calibration(model.shape, job.trains, _read_calibration(args.calibration))
    return replace(job, time=measured)


def _read_calibration(path: Path) -> dict:
    try:
        measured = json.loads(path.read_text())
    except ValueError as error:
        raise PipelinePlanError(f"{path} is not JSON: {error}") from None
    if not isinstance(measured, dict):
        raise PipelinePlanError(f"{path} holds no calibration: write it with --calibrate")
    return measured


def _lines(model: DescribedModel, job: Job, even: Plan, best: Plan, args: argparse.Namespace) -> list[str]:
    source = args.calibration or f"{args.peak_tflops:g} TFLOP/s x {args.efficiency:g}"
    division = job.division
    lines = [
        f"{args.world_size:,} ranks: TP {division.tensor_size} x PP {job.num_stages} x DP {division.data_size}, "
        f"{job.num_microbatches} micro-batches of {division.micro_batch_size} x {division.seq_length} tokens a step; "
        f"times from {source}"
    ]
    for name, plan in (("even split", even), ("best split", best)):
        whole = run_cost(job, plan.seconds, peak_tflops=args.peak_tflops, tokens=args.tokens)
        lines += [
            "",
            f"{name}: {', '.join(map(str, plan.counts))}",
            draw(plan.counts, set(model.plan.added_layers), num_stages=job.num_stages),
            "stage   forward  backward  ms a micro-batch   memory a rank",
        ]
        rows = zip(plan.stage_forward, plan.stage_backward, plan.stage_bytes, strict=True)
        for stage, (forward, backward, num_bytes) in enumerate(rows):
            lines.append(f"{stage:>5} {1e3 * forward:>9.2f} {1e3 * backward:>9.2f} {num_bytes / GIB:>28.1f} GiB")
        lines.append(
            f"step {plan.seconds:.2f} s, bubble {plan.bubble:.1%}; {whole.tokens_per_second:,.0f} tokens/s "
            f"({whole.tokens_per_second / args.world_size:,.0f} a rank), MFU {whole.model_flops_utilization:.1%}; "
            f"{whole.gpu_hours:,.0f} GPU-hours for {args.tokens / 1e9:g} B tokens"
        )
    gain = even.seconds / best.seconds
    proof = "no split is faster" if best.is_proven else "the best of those tried"
    return [*lines, "", f"the best split is {gain:.3f} x as fast as the even one ({proof})"]


def _calibrate(config: RunConfig, model: DescribedModel, output: Path) -> None:
    """Time the blocks on the started ranks (one tensor-parallel group), and write the times."""
    import torch.distributed as dist

    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.distributed import start_world, stop_world

    import_megatron()
    cpu.install()
    from megatron_llamapro.training.calibration import calibrate

    start_world()
    try:
        measured = calibrate(config, model.shape)
        if dist.get_rank() == 0:
            write_atomically(output, json.dumps(measured, indent=2) + "\n")
            for kind, times in measured.items():
                print(
                    f"{kind:>9}: forward {1e3 * times['forward']:8.2f} ms, backward {1e3 * times['backward']:8.2f} ms"
                )
    finally:
        stop_world()
