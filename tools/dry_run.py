"""What every rank of a job would hold, execute and send in a step: the program itself, run on tensors without data.
Needs no GPU, no weights and no corpus, and takes seconds a rank.

python tools/dry_run.py --config run.yaml --world_size 16 [--ranks all|0,5] [--memory_gib 80] [--json]
python tools/dry_run.py --config run.yaml --world_size 16 --hf_config llama-2-7b-hf --num_added_blocks 8

Any field of the configuration can be overridden by its dotted name, as for pretrain. Exit code 1: a rank would not fit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.commands.expansion_options import add_expansion_options, read_expansion_options
from megatron_llamapro.config.command import CommandParser, run_command


def main() -> int:
    """Read the options, run the ranks, print what they did."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--world_size", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--ranks", type=_ranks, default=None, help="all: one of every stage (default), or a list: 0,5")
    parser.add_argument("--memory_gib", type=float, metavar="GIB", help="of a GPU; exit code 1 where it is not enough")
    parser.add_argument("--largest", type=int, default=0, metavar="N", help="name the N largest things at the peak")
    parser.add_argument("--hf_config", type=Path, metavar="DIR", help="a model that is not converted yet: config.json")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and FLOPs")
    add_expansion_options(parser)
    args, run_args = parser.parse_own_args()

    from megatron_llamapro.config.io import parse_run_config

    config, expansion = parse_run_config(run_args), read_expansion_options(parser, args)

    from megatron_llamapro.commands.dry_run import run

    return run(config, args, expansion)


def _ranks(text: str) -> list[int] | None:
    try:
        return None if text == "all" else [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither all nor a list of ranks such as 0,5") from None


if __name__ == "__main__":
    run_command(main)
