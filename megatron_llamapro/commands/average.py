"""Write the mean of several checkpoints of a run. Only the trained tensors are averaged.

llamapro average --checkpoint runs/first/iter_0000300 runs/first/iter_0000400 --target HF_DIR
llamapro average --run runs/first --last 3 --target HF_DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import megatron_llamapro.commands.options as shared
from megatron_llamapro.checkpoint.formats.folders import newest_checkpoints
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.config.command import CommandParser


def main(arguments: Sequence[str]) -> int:
    """Read the options, average, print a summary."""
    parser = CommandParser(prog="llamapro average", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", action="extend", metavar="DIR", help="Megatron checkpoints of one run"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="instead: a run's folder, with --last")
    parser.add_argument("--last", type=int, metavar="N", help="average the newest N checkpoints of --run")
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="folder to write")
    shared.add_result_options(parser)
    shared.add_writing_options(parser)
    args = parser.parse_args(arguments)
    checkpoints, kind = _checkpoints(parser, args), shared.read_result_options(parser, args)

    from megatron_llamapro.checkpoint.average import average

    with shared.writing_options("averaging", args) as options:
        done = average(checkpoints, args.target, kind=kind, options=options)
    print(f"{summary(done)}\nthe mean of {', '.join(map(str, checkpoints))}")
    return 0


def _checkpoints(parser: CommandParser, args: argparse.Namespace) -> list[Path]:
    if (args.checkpoint is None) is (args.run is None):
        parser.error("say what to average: --checkpoint DIR DIR, or --run DIR --last N")
    if (args.run is None) is not (args.last is None):
        parser.error("--run and --last belong together: --run runs/first --last 3")
    if args.checkpoint is not None:
        return args.checkpoint
    if args.last < 2:
        parser.error(f"--last is {args.last}: a mean needs 2 checkpoints or more")
    return newest_checkpoints(args.run, args.last)
