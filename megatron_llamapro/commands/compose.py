"""Put packs of added blocks into the model that they were extracted for. No pack gives that model back.

llamapro compose --base DIR --pack packs/cpp --pack packs/law --scale 0.75 --scale 1 --target HF_DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import megatron_llamapro.commands.options as shared
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.config.command import CommandParser


def main(arguments: Sequence[str]) -> int:
    """Read the options, compose, print a summary."""
    parser = CommandParser(prog="llamapro compose", description=__doc__)
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        metavar="DIR",
        help="model that the packs' runs were expanded from, in any format",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="PACK",
        help="packs (llamapro extract); where two have blocks behind the same original block, they stand in this order",
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        action="extend",
        default=[],
        metavar="SCALE",
        help="factor of each pack's output projections, from 0 to 2, in the order of the packs (default: 1)",
    )
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="folder to write")
    shared.add_result_options(parser)
    shared.add_writing_options(parser)
    args = parser.parse_args(arguments)
    scales, kind = _scales(parser, args), shared.read_result_options(parser, args)

    from megatron_llamapro.checkpoint.compose import ScaledPack, compose

    packs = [ScaledPack(folder, scale) for folder, scale in zip(args.pack, scales, strict=True)]
    with shared.writing_options("composing", args) as options:
        done = compose(args.base, args.target, packs=packs, kind=kind, options=options)
    print(summary(done))
    for number, pack in enumerate(packs, 1):
        layers = (i for i, layer in enumerate(done.plan.layers) if layer.added_in_round == number)
        print(f"pack {pack.folder} × {pack.scale:g}: blocks {', '.join(map(str, layers))} (round {number})")
    return 0


def _scales(parser: CommandParser, args: argparse.Namespace) -> list[float]:
    if args.scale and len(args.scale) != len(args.pack):
        parser.error(f"--scale has {len(args.scale)} values for {len(args.pack)} packs: give one for each, or none")
    return args.scale or [1.0] * len(args.pack)
