"""Plot the metrics of one or more runs: loss, held-out losses, gradient norm, learning rate, tokens per second.

llamapro plot --input runs/first runs/second --output plot.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.config.command import CommandParser
from megatron_llamapro.config.errors import ConfigError, DataError
from megatron_llamapro.config.files import check_can_hold, check_output
from megatron_llamapro.config.pictures import panels
from megatron_llamapro.training.metrics import BLOCK_FIGURES
from megatron_llamapro.training.metrics_file import figure, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = list[tuple[int, float]]
Panels = dict[tuple[str, str], Series]
"""Points by panel and line. The only line of a panel has an empty name."""

LINE_STYLES = ("-", "--", ":", "-.")  # one per run, in panels where every run has several lines

# Fields of a `train` record that get a panel, with their axis labels.
TRAIN_PANELS = {
    "loss": "training loss, nats per token",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}
# Fields that only some runs have.
OPTIONAL_PANELS = {"penalty": "penalty on added blocks, before its weight"}


def main(arguments: Sequence[str]) -> int:
    """Read the options, draw, print the picture's path."""
    parser = CommandParser(prog="llamapro plot", description=__doc__)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="RUN", help="folders of runs, or their metrics.jsonl"
    )
    parser.add_argument("--label", nargs="+", help="a name for each run (default: from the file names)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.png",
        help="picture to write (png, pdf, svg; without an extension: png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    args = parser.parse_args(arguments)
    if args.label and len(args.label) != len(args.input):
        parser.error(f"--label names {len(args.label)} runs, --input {len(args.input)}")
    output = args.output if args.output.suffix else args.output.with_name(f"{args.output.name}.png")
    check_can_hold(args.output)
    check_output(output, overwrite=args.overwrite)
    inputs = [path / "metrics.jsonl" if path.is_dir() else path for path in args.input]
    labels = args.label or labels_of(inputs)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"runs have the same name, {', '.join(labels)}: give each its own with --label")
    plot({label: read_series(path) for label, path in zip(labels, inputs, strict=True)}, output)
    print(output)
    return 0


def read_series(path: Path) -> Panels:
    """Return the points of every panel. Held-out sets have panels `held-out <name>`; panels of blocks have one line per
    added block.

    Raises:
        DataError: the file does not exist, or holds no records.
    """
    series: Panels = {}
    for record in read_records(path):
        try:
            for name, value in _values(record).items():
                series.setdefault(name, []).append((record["iteration"], value))
        except KeyError as error:
            raise DataError(f"{path}: not a metrics record: {error} is missing in {record}") from None
    if not series:
        raise DataError(f"{path} holds no steps yet")
    return series


def _values(record: Mapping) -> dict[tuple[str, str], float]:
    """Return a record's values by panel and line. One that was not finite is NaN, which leaves a gap in the line."""
    if record["kind"] == "eval":
        return {(f"held-out {record['name']}", ""): figure(record, "loss")}
    if record["kind"] == "train":
        panels = {**TRAIN_PANELS, **{name: panel for name, panel in OPTIONAL_PANELS.items() if name in record}}
        return {(panel, ""): figure(record, name) for name, panel in panels.items()}
    if record["kind"] == "block":
        return {(panel, f"block {record['layer']}"): figure(record, name) for name, panel in BLOCK_FIGURES.items()}
    return {}


def plot(runs: Mapping[str, Panels], output: Path) -> None:
    """Draw the panels into `output`, whose extension sets the format. Runs, by label, share the panels.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    names = list(dict.fromkeys(panel for series in runs.values() for panel, _ in series))
    columns = min(3, len(names))
    with panels(output, -(-len(names) // columns), columns, width=4.2, height=3) as rows:
        grid = [axis for row in rows for axis in row]
        for axis in grid[len(names) :]:
            axis.set_axis_off()
        for axis, name in zip(grid, names, strict=False):
            _draw_panel(axis, name, runs)
        if len(runs) > 1:
            grid[0].legend(frameon=False)


def _draw_panel(axis: Axes, name: str, runs: Mapping[str, Panels]) -> None:
    for style, (run, series) in zip(cycle(LINE_STYLES), runs.items(), strict=False):
        lines = {line: points for (panel, line), points in series.items() if panel == name}
        for line, points in lines.items():
            label = " ".join(filter(None, (run if len(runs) > 1 else "", line)))
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5, linestyle=style if line else "-")
        if any(lines):
            axis.legend(frameon=False, fontsize="x-small")
    axis.set(title=name, xlabel="step")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return a label for each file: its folder's name if file names repeat, else its own name."""
    alike = len({path.name for path in paths}) < len(paths)
    return [path.absolute().parent.name if alike else path.stem for path in paths]
