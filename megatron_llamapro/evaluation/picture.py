"""Draws evaluations: what a new domain gains against what each known set loses, and the scores of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.config.pictures import panels
from megatron_llamapro.evaluation.ranking import BlockScore, Ranking
from megatron_llamapro.evaluation.results import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED_SCALES = 6  # with more points, their labels overlap
LINEAR_BELOW = 0.01  # scores of blocks range from about 0 to several nats
SCORE_LABELS = {
    BlockScore.LEFT_OUT: "loss without the block: increase, nats per token",
    BlockScore.STREAM_CHANGE: "change of the residual stream",
}


def draw_curves(rows: Sequence[Mapping[str, Curve]], output: Path, *, tolerance: float) -> None:
    """Draw curves by label: a row of panels per element of `rows`, a panel per known set. `output`'s extension sets the
    format. All curves have the same known sets, those of a row also the same new ones. A label has one color.

    Up is more gain in the new domain; right is more loss of the known set. A point is a scale of the dial, and the
    origin is scale 0.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    known = _first(rows[0]).known
    labels = list(dict.fromkeys(label for curves in rows for label in curves))
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    with panels(output, len(rows), len(known), width=4.6, height=3.6, same_scale=True) as grid:
        for axes, curves in zip(grid, rows, strict=True):
            for axis, name in zip(axes, known, strict=True):
                _draw_panel(axis, curves, name, tolerance, colors)
            axes[0].set(ylabel=f"gain in {', '.join(_first(curves).new)}, nats per token")
        if len(labels) > 1:
            lines = {line.get_label(): line for axes in grid for line in axes[0].get_lines()}
            shown = [lines[label] for label in labels]
            grid[0][0].figure.legend(handles=shown, loc="outside upper center", ncols=2, frameon=False)


def draw_blocks(ranking: Ranking, output: Path) -> None:
    """Draw the score of every block into `output`, whose extension sets the format: a line for the mean over the known
    sets, one for the new sets. The chosen blocks are shaded. The score's axis is linear near 0, else logarithmic.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    with panels(output, 1, 1, width=8, height=4) as [[axis]]:
        for number, block in enumerate(ranking.chosen):
            axis.axvspan(block - 0.5, block + 0.5, color="0.9", label=None if number else "chosen")
        for label, names in (("known", ranking.known), ("new", ranking.new)):
            if names:
                means = ranking.mean(names)
                axis.plot(means, marker="o", markersize=4, linewidth=1.5, label=f"{label}: {', '.join(names)}")
        axis.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.locator_params(axis="x", integer=True)
        axis.set(xlabel="source block", ylabel=SCORE_LABELS[ranking.by])
        axis.legend(frameon=False, fontsize="small")


def _first(curves: Mapping[str, Curve]) -> Curve:
    return next(iter(curves.values()))


def _draw_panel(
    axis: Axes, curves: Mapping[str, Curve], known: str, tolerance: float, colors: Mapping[str, str]
) -> None:
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.axvline(tolerance, color="0.6", linewidth=0.8, linestyle=":")
    for label, curve in curves.items():
        scales = sorted(curve.losses)
        changes = [curve.losses[scale][known] - curve.losses[0.0][known] for scale in scales]
        gains = [curve.gain(scale) for scale in scales]
        axis.plot(changes, gains, marker="o", markersize=4, linewidth=1.5, label=label, color=colors[label])
        if len(curves) == 1 and len(scales) <= LABELLED_SCALES:
            for scale, *place in zip(scales, changes, gains, strict=True):
                axis.annotate(f"{scale:g}", place, textcoords="offset points", xytext=(6, -3), fontsize="small")
    axis.set(xlabel=f"change of the loss of {known}, nats per token")
