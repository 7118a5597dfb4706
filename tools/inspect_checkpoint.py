"""Say what a checkpoint is: family, layers, expansion plan, what trains, sizes. Reads headers only.

python tools/inspect_checkpoint.py --checkpoint DIR [--json]
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.config.command import CommandParser, run_command


def main() -> int:
    """Print the description."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face or Megatron checkpoint, or a run's folder (its newest checkpoint)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; sizes are in bytes")
    args = parser.parse_args()

    import json

    from megatron_llamapro.checkpoint.inspection import inspect

    found = inspect(args.checkpoint)
    print(json.dumps(found.to_json(), indent=2) if args.json else found)
    return 0


if __name__ == "__main__":
    run_command(main)
