"""Command-line options shared by the commands that plan a job. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_llamapro.commands.expansion_options import add_expansion_options
from megatron_llamapro.config.command import CommandParser, check_positive
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import check_can_hold
from megatron_llamapro.planning.duration import EFFICIENCY, PEAK_TFLOPS, TOKENS


def add_job_options(parser: CommandParser) -> None:
    """Add --world_size, --hf_config, --json and the options for added blocks."""
    parser.add_argument("--world_size", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--hf_config", type=Path, metavar="DIR", help="folder of a model that is not converted yet (config.json)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds, bytes and FLOPs")
    add_expansion_options(parser)


def add_duration_options(parser: CommandParser) -> None:
    """Add the assumptions about a rank and the run, and --output."""
    parser.add_argument(
        "--tokens", type=float, default=TOKENS, metavar="N", help="training tokens (default: the paper's 80e9)"
    )
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=PEAK_TFLOPS,
        metavar="N",
        help="peak TFLOP/s of a rank (default: H100, bf16)",
    )
    parser.add_argument(
        "--efficiency", type=float, default=EFFICIENCY, metavar="PART", help="fraction of the peak that a block reaches"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.yaml", help="write the best one, as another --config of the run"
    )


def check_duration_options(args: argparse.Namespace) -> None:
    """Raise `ConfigError` if --world_size or an option of `add_duration_options` has an impossible value."""
    check_positive(args, "world_size", "peak_tflops", "efficiency", "tokens")
    check_can_hold(args.output)
    if args.efficiency > 1:
        raise ConfigError(f"--efficiency is {args.efficiency:g}: it must be at most 1, e.g. 0.4")
