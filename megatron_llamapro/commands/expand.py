"""Add blocks to a Hugging Face LLaMA. Until it is trained, the result computes what the original does.

llamapro expand --source HF_DIR --target HF_DIR (--num_added_blocks N | --positions 4,9,14)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import megatron_llamapro.commands.options as shared
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.config.command import CommandParser


def main(arguments: Sequence[str]) -> int:
    """Read the options, expand, print a summary."""
    parser = CommandParser(prog="llamapro expand", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="HF_DIR", help="Hugging Face checkpoint")
    parser.add_argument("--target", type=Path, required=True, metavar="HF_DIR", help="folder to write")
    for add in (shared.add_change_options, shared.add_shard_option, shared.add_writing_options):
        add(parser)
    args = parser.parse_args(arguments)
    settings = shared.read_change_options(parser, args)
    if settings["expansion"] is None:
        parser.error("say which blocks to add: --num_added_blocks N, or --positions 4,9,14")

    from megatron_llamapro.checkpoint.convert import expand_hf

    with shared.writing_options("expanding", args) as options:
        done = expand_hf(args.source, args.target, max_shard_bytes=args.max_shard_bytes, options=options, **settings)
    print(summary(done))
    return 0
