"""Draw the metrics of one or several runs: loss, held-out losses, gradient norm, learning rate, tokens a second.

python tools/plot_metrics.py --input runs/first runs/second --output plot.png
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import check_can_hold


def main() -> int:
    """Read the options, draw, say where the picture is."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="RUN", help="folders of runs, or their metrics.jsonl"
    )
    parser.add_argument("--label", nargs="+", help="a name for each run (default: from the files' names)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.png",
        help="picture to write (png, pdf, svg; without an ending: png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    args = parser.parse_args()
    if args.label and len(args.label) != len(args.input):
        parser.error(f"--label names {len(args.label)} runs, --input {len(args.input)}")
    output = args.output if args.output.suffix else args.output.with_name(f"{args.output.name}.png")
    for path in (args.output, output):
        check_can_hold(path)
    if output.exists() and not args.overwrite:
        raise ConfigError(f"{output} exists: choose another --output, or give --overwrite")

    from megatron_llamapro.commands.plot import labels_of, plot, read_series

    inputs = [path / "metrics.jsonl" if path.is_dir() else path for path in args.input]
    labels = args.label or labels_of(inputs)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"runs have the same name, {', '.join(labels)}: give each its own with --label")
    plot({label: read_series(path) for label, path in zip(labels, inputs, strict=True)}, output)
    print(output)
    return 0


if __name__ == "__main__":
    run_command(main)
