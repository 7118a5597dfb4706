"""Speed and cost of a whole run, from its step time."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_llamapro.config.command import CommandParser, check_positive
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import check_can_hold
from megatron_llamapro.planning.flops import step_work
from megatron_llamapro.planning.job import Job


@dataclass(frozen=True)
class Outcome:
    """Speed and cost of a run."""

    tokens_per_second: float
    """Over all ranks."""
    model_flops_utilization: float
    """FLOPs that the training needs, as a fraction of the ranks' peak."""
    gpu_hours: float
    """For the requested tokens."""


PEAK_TFLOPS, EFFICIENCY, TOKENS = 989, 0.4, 80e9
"""An H100's dense bfloat16 from its data sheet; a round number (docs/planning.md); the paper's tokens."""


def outcome(job: Job, seconds: float, *, peak_tflops: float = PEAK_TFLOPS, tokens: float = TOKENS) -> Outcome:
    """Return speed and cost of a job whose step takes `seconds`."""
    division = job.division
    num_ranks = division.tensor_size * job.num_stages * division.data_size
    speed = job.num_microbatches * division.tokens * division.data_size / seconds
    work = step_work(job.shape, seq_length=division.seq_length, trains=job.trains).total
    return Outcome(speed, work * speed / (num_ranks * peak_tflops * 1e12), tokens / speed / 3600 * num_ranks)


def add_options(parser: CommandParser) -> None:
    """Add the options for the number of tokens and the speed of a rank, which both planning tools have."""
    parser.add_argument(
        "--tokens", type=float, default=TOKENS, metavar="N", help="training tokens (default: the paper's 80e9)"
    )
    parser.add_argument(
        "--peak_tflops", type=float, default=PEAK_TFLOPS, metavar="N", help="peak of a rank (default: H100, bf16)"
    )
    parser.add_argument(
        "--efficiency", type=float, default=EFFICIENCY, metavar="PART", help="part of the peak that a block reaches"
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise `ConfigError` if the value of one of `add_options` is impossible."""
    check_positive(args, "world_size", "peak_tflops", "efficiency", "tokens")
    check_can_hold(args.output)
    if args.efficiency > 1:
        raise ConfigError(f"--efficiency is {args.efficiency:g}: it must be at most 1, e.g. 0.4")
