"""Print the held-out losses of a learning-rate sweep as a Markdown table.

python examples/smollm2_pro/sweep_table.py --metrics_dir DIR
"""

from __future__ import annotations

import statistics
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.training.metrics_file import figure, read_records

DOMAINS = ("cpp", "english", "python")


def last_losses(path: Path) -> dict[str, float]:
    """Return the last held-out loss of each domain."""
    return {record["name"]: figure(record, "loss") for record in read_records(path) if record["kind"] == "eval"}


def method_and_rate(path: Path) -> tuple[str, float]:
    """Split a file name: llamapro-2e-3.jsonl → llamapro, 0.002."""
    method, _, rate = path.stem.partition("-")
    return method, float(rate)


def main() -> int:
    """Print one row per run."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--metrics_dir", type=Path, required=True, metavar="DIR", help="folder with the metrics of sweep.sh"
    )
    args = parser.parse_args()
    print(f"| method | learning rate | {' | '.join(DOMAINS)} | mean |")
    print("|---|---|" + "---|" * (len(DOMAINS) + 1))
    for path in sorted(args.metrics_dir.glob("*.jsonl"), key=method_and_rate):
        method, rate = method_and_rate(path)
        losses = last_losses(path)
        figures = [*(losses[domain] for domain in DOMAINS), statistics.mean(losses[domain] for domain in DOMAINS)]
        print(f"| {method} | {rate:g} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
    return 0


if __name__ == "__main__":
    run_command(main)
