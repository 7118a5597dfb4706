"""What tools/dry_run.py does once its options are read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_llamapro.checkpoint.description import describe_model
from megatron_llamapro.config.command import check_positive
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.dry_run.run import check_runs_dry
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.runtime.upstream import import_megatron


def run(config: RunConfig, args: argparse.Namespace, expansion: Expansion | None) -> int:
    """Run the ranks, printing each when it is done (as JSON all at the end). Returns the exit code."""
    check_positive(args, "memory_gib")
    if args.largest < 0:
        raise ConfigError(f"--largest is {args.largest}: it cannot be negative")
    model = describe_model(Path(config.model.checkpoint), hf_config=args.hf_config, expansion=expansion)
    check_runs_dry(config, model, args.world_size)
    if not all(0 <= rank < args.world_size for rank in args.ranks or ()):
        raise ConfigError(f"--ranks names a rank that a job of {args.world_size} does not have")

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
        print(f"every rank that was run fits into {args.memory_gib:g} GiB")
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0
