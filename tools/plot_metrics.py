"""Draw the metrics of one or several runs: loss, held-out losses, gradient norm, learning rate, tokens a second.

python tools/plot_metrics.py --input metrics.jsonl... --output plot.png
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError


def main() -> int:
    """Read the options, draw, say where the picture is."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE.jsonl", help="runs' metrics")
    parser.add_argument("--label", nargs="+", help="a name for each run (default: from the files' names)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.png", help="picture to write (png, pdf, svg)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    args = parser.parse_args()
    if args.label and len(args.label) != len(args.input):
        parser.error(f"--label names {len(args.label)} runs, --input {len(args.input)}")
    if args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output} exists: choose another --output, or give --overwrite")

    from megatron_llamapro.training.plots import labels_of, plot, read_series

    labels = args.label or labels_of(args.input)
    plot({label: read_series(path) for label, path in zip(labels, args.input, strict=True)}, args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    run_command(main)
