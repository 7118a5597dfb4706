"""Command-line options for added blocks, shared by every command that takes them. Imports no torch."""

from __future__ import annotations

import argparse

from megatron_llamapro.config.command import CommandParser
from megatron_llamapro.expansion.plan import Placement
from megatron_llamapro.expansion.round import Expansion, Init, check_init


def add_expansion_options(parser: argparse.ArgumentParser) -> None:
    """Add --num_added_blocks, --placement, --blocks_per_group, --init, --init_seed, --force and --positions."""
    group = parser.add_argument_group("added blocks")
    group.add_argument(
        "--num_added_blocks",
        type=int,
        metavar="N",
        help="blocks to add; interleaved blocks are spread as evenly as N allows",
    )
    group.add_argument(
        "--placement",
        choices=[placement.value for placement in Placement],
        help="interleaved (the paper's, default): a copy after every group of blocks; prefix: copies of the first N "
        "blocks before block 0; suffix: copies of the last N blocks after the last",
    )
    group.add_argument(
        "--blocks_per_group",
        type=int,
        metavar="P",
        help="interleaved: copy the last P blocks of a group after it (default: 1); P must divide N",
    )
    group.add_argument(
        "--init",
        choices=[init.value for init in Init],
        help="initial weights of an added block. copy (the paper's, default): its source block; random; mean: the mean "
        "of its source and the next block; all with zeroed output projections. zero_norm: a copy with zeroed norms",
    )
    group.add_argument("--init_seed", type=int, metavar="N", help="seed of --init random (default: 0)")
    group.add_argument("--force", action="store_true", help="allow --init zero_norm, which cannot learn")
    group.add_argument(
        "--positions",
        type=_layer_indices,
        metavar="4,9,14",
        help="instead of a number and a placement: layer indices of the added blocks in the expanded model, from 0, "
        "ascending",
    )


def read_expansion_options(parser: CommandParser, args: argparse.Namespace) -> Expansion | None:
    """Return the expansion that the options ask for, or None for no added blocks. Contradictory options end the
    program with a usage error.

    Raises:
        ExpansionError: an init that cannot learn.
    """
    if not _asks_for_blocks(parser, args):
        given = [name for name in ("init", "init_seed") if getattr(args, name) is not None]
        if given:
            parser.error(f"--{given[0]} needs --num_added_blocks or --positions")
        return None
    init = Init(args.init or Init.COPY.value)
    if args.init_seed is not None and init is not Init.RANDOM:
        parser.error(f"--init_seed is for --init random: {init.value} uses no random numbers")
    if (args.init_seed or 0) < 0:
        parser.error(f"--init_seed is {args.init_seed}: it cannot be negative")
    check_init(init, force=args.force)
    return Expansion(
        positions=args.positions,
        num_added_blocks=args.num_added_blocks,
        placement=Placement(args.placement or Placement.INTERLEAVED.value),
        blocks_per_group=1 if args.blocks_per_group is None else args.blocks_per_group,
        init=init,
        seed=args.init_seed or 0,
    )


def _asks_for_blocks(parser: CommandParser, args: argparse.Namespace) -> bool:
    counted = [
        name for name in ("num_added_blocks", "placement", "blocks_per_group") if getattr(args, name) is not None
    ]
    if args.positions is not None and counted:
        parser.error(f"--positions already places every added block: leave out --{counted[0]}")
    if args.positions is None and args.num_added_blocks is None and counted:
        parser.error(f"--{counted[0]} needs --num_added_blocks")
    return args.positions is not None or args.num_added_blocks is not None


def _layer_indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of layer indices such as 4,9,14") from None
