"""Describe a checkpoint: family, layers, expansion plan, trainable part, sizes. Reads headers only.

llamapro inspect --checkpoint DIR [--json]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.config.command import CommandParser


def main(arguments: Sequence[str]) -> int:
    """Print the description."""
    parser = CommandParser(prog="llamapro inspect", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face or Megatron checkpoint, or a run's folder (its newest checkpoint)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; sizes are in bytes")
    args = parser.parse_args(arguments)

    from megatron_llamapro.checkpoint.inspection import inspect

    found = inspect(args.checkpoint)
    print(json.dumps(found.to_json(), indent=2) if args.json else found)
    return 0
