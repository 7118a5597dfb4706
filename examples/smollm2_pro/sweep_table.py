"""Held-out losses of a learning-rate sweep, as a Markdown table.

python examples/smollm2_pro/sweep_table.py --metrics_dir DIR
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command

DOMAINS = ("cpp", "english", "python")


def last_losses(path: Path) -> dict[str, float]:
    """The last held-out loss of each domain."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["name"]: record["loss"] for record in records if record["kind"] == "eval"}


def main() -> int:
    """Print one row a run."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--metrics_dir", type=Path, required=True, metavar="DIR", help="where sweep.sh left its metrics"
    )
    args = parser.parse_args()
    print(f"| method | learning rate | {' | '.join(DOMAINS)} |")
    print("|---|---|" + "---|" * len(DOMAINS))
    for path in sorted(args.metrics_dir.glob("*.jsonl")):
        method, _, rate = path.stem.partition("-")
        losses = last_losses(path)
        print(f"| {method} | {rate} | {' | '.join(f'{losses[domain]:.3f}' for domain in DOMAINS)} |")
    return 0


if __name__ == "__main__":
    run_command(main)
