"""Show what every rank of a job would hold, execute and send in a step. Runs the program itself on tensors without
data. Needs no GPU, weights or corpus, and takes seconds per rank.

llamapro dry-run --config run.yaml --world_size 16 [--ranks all|0,5] [--memory_gib 80] [--json]
llamapro dry-run --config run.yaml --world_size 16 --hf_config llama-2-7b-hf --num_added_blocks 8

Any field of the configuration can be overridden by its dotted name, as in train. Exit code 1: a rank would not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.checkpoint.description import DescribedModel, check_runs_dry, describe_model
from megatron_llamapro.commands.options import add_job_options, read_expansion_options
from megatron_llamapro.config.command import CommandParser, check_positive
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.runtime.upstream import import_megatron


def main(arguments: Sequence[str]) -> int:
    """Read the options and run the ranks. Print each when it is done, or all at the end as JSON."""
    parser = CommandParser(prog="llamapro dry-run", description=__doc__)
    add_job_options(parser)
    parser.add_argument(
        "--ranks", type=_ranks, default=None, help="all: one rank of every stage (default), or a list: 0,5"
    )
    parser.add_argument("--memory_gib", type=float, metavar="GIB", help="GPU memory; exit code 1 if a rank needs more")
    parser.add_argument("--largest", type=int, default=0, metavar="N", help="list the N largest tensors at the peak")
    args, run_args = parser.parse_own_args(arguments)
    config, expansion = parse_run_config(run_args), read_expansion_options(parser, args)
    check_positive(args, "memory_gib")
    if args.largest < 0:
        raise ConfigError(f"--largest is {args.largest}: it cannot be negative")
    model = describe_model(Path(config.model.checkpoint), hf_config=args.hf_config, expansion=expansion)
    check_runs_dry(config, model, args.world_size)
    if not all(0 <= rank < args.world_size for rank in args.ranks or ()):
        raise ConfigError(f"--ranks names a rank that a job of {args.world_size} does not have")
    return _run(config, model, args)


def _ranks(text: str) -> list[int] | None:
    try:
        return None if text == "all" else [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither all nor a list of ranks such as 0,5") from None


def _run(config: RunConfig, model: DescribedModel, args: argparse.Namespace) -> int:
    from megatron_llamapro.runtime import cpu

    import_megatron()
    cpu.install()
    from megatron_llamapro.dry_run.report import arithmetic_of, describe, heading, to_json, too_large, total_line
    from megatron_llamapro.dry_run.run import distinct_ranks, dry_run

    ranks = args.ranks or distinct_ranks(config, args.world_size)
    if not args.json:
        print(heading(config, model, world_size=args.world_size), flush=True)
    arithmetic = arithmetic_of(config, model, world_size=args.world_size)
    reports = []
    for rank in ranks:
        report = dry_run(config, model, world_size=args.world_size, rank=rank, num_largest=args.largest)
        reports.append(report)
        if not args.json:
            print(describe(config, report, arithmetic[report.stage], world_size=args.world_size), flush=True)
    if args.json:
        print(json.dumps(to_json(config, model, reports, world_size=args.world_size), indent=2))
    else:
        print(total_line(config, model, reports))
    lines = too_large(reports, args.memory_gib) if args.memory_gib else []
    if args.memory_gib and not lines and not args.json:
        print(f"every rank of this dry run fits into {args.memory_gib:g} GiB")
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0
