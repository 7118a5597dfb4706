"""Convert a LLaMA between Hugging Face (safetensors) and Megatron (torch_dist or legacy); add blocks if asked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_llamapro.commands.options as shared
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.config.command import CommandParser

SOURCES = {"HF_DIR": "Hugging Face checkpoint", "DIR": "checkpoint, or a run's folder (its newest checkpoint)"}


@dataclass(frozen=True)
class Direction:
    """One direction of conversion: its description, source, target, and an option or two as an example."""

    line: str
    source: str
    target: str
    options: str


DIRECTIONS = {
    "hf-to-megatron": Direction(
        "Hugging Face → Megatron, with or without added blocks",
        "HF_DIR",
        "DIR",
        "[--num_added_blocks N | --positions 4,9]",
    ),
    "megatron-to-hf": Direction("Megatron → Hugging Face", "DIR", "HF_DIR", "[--max_shard_size 5GB]"),
    "hf-to-hf": Direction(
        "Hugging Face → Hugging Face, dialed or cast",
        "HF_DIR",
        "HF_DIR",
        "--added_block_scale 0.75",
    ),
    "megatron-to-megatron": Direction(
        "Megatron → another format, parallel layout, or round of added blocks", "DIR", "DIR", "--format legacy"
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Read the options, convert, print a summary."""
    parser = CommandParser(prog="llamapro convert", description="\n".join([f"{__doc__}\n", *map(_example, DIRECTIONS)]))
    commands = parser.add_subparsers(dest="direction", required=True, metavar=f"{{{','.join(DIRECTIONS)}}}")
    parsers = {}
    for name, direction in DIRECTIONS.items():
        description = f"{direction.line}.\n\n{_example(name)}"
        parsers[name] = commands.add_parser(name, help=direction.line, description=description)
        _add_options(parsers[name], name)
    args = parser.parse_args(arguments)
    settings = _read(parsers[args.direction], args)

    from megatron_llamapro.checkpoint import convert

    with shared.writing_options("converting", args) as options:
        function = getattr(convert, args.direction.replace("-", "_"))
        done = function(args.source, args.target, options=options, **settings)
    print(summary(done))
    return 0


def _example(name: str) -> str:
    direction = DIRECTIONS[name]
    return f"llamapro convert {name} --source {direction.source} --target {direction.target} {direction.options}"


def _add_options(parser: CommandParser, name: str) -> None:
    source, target = DIRECTIONS[name].source, DIRECTIONS[name].target
    parser.add_argument("--source", type=Path, required=True, metavar=source, help=SOURCES[source])
    parser.add_argument("--target", type=Path, required=True, metavar=target, help="folder to write")
    if target == "HF_DIR":
        shared.add_shard_option(parser)
    else:
        shared.add_change_options(parser)
        shared.add_format_options(parser)
    if name == "hf-to-hf":
        shared.add_dtype_option(parser)
    shared.add_dial_options(parser)
    shared.add_writing_options(parser)


def _read(parser: CommandParser, args: argparse.Namespace) -> dict:
    settings = {"dial": shared.read_dial_options(parser, args)}
    if args.direction == "megatron-to-hf":
        return {**settings, "max_shard_bytes": args.max_shard_bytes}
    if args.direction == "hf-to-hf":
        return {**settings, "max_shard_bytes": args.max_shard_bytes, "dtype": args.dtype}
    return {**settings, **shared.read_change_options(parser, args), "kind": shared.read_format_options(parser, args)}
