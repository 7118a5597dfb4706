"""Write the added blocks of a run as a pack: a removable part for the model that they were added to.

llamapro extract --source runs/first --target packs/cpp
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import megatron_llamapro.commands.options as shared
from megatron_llamapro.config.command import CommandParser
from megatron_llamapro.config.values import decimal_size


def main(arguments: Sequence[str]) -> int:
    """Read the options, extract, print a summary."""
    parser = CommandParser(prog="llamapro extract", description=__doc__)
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="DIR",
        help="expanded checkpoint in any format, or a run's folder (its newest checkpoint)",
    )
    parser.add_argument("--target", type=Path, required=True, metavar="PACK", help="folder to write")
    shared.add_writing_options(parser)
    args = parser.parse_args(arguments)

    from megatron_llamapro.checkpoint.extract import extract

    with shared.writing_options("extracting", args) as options:
        done = extract(args.source, args.target, options=options)
    plan = done.record.manifest.plan
    print(
        f"{done.target}: {len(plan.added_layers)} added blocks of {len(plan.original_layers)} original ones\n"
        f"blocks: {', '.join(map(str, plan.added_layers))}, copied from "
        f"{', '.join(str(plan.layers[layer].source_layer) for layer in plan.added_layers)} of the original\n"
        f"{decimal_size(done.num_bytes)} of {done.record.manifest.dtype} weights, read back and compared\n"
        f"{done.num_originals} original tensors are those of {done.record.manifest.source.name}, by their hashes"
    )
    return 0
