"""Draws evaluations: what a new domain gains against what each known set loses, and the scores of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.evaluation.ranking import BlockScore, Ranking
from megatron_llamapro.evaluation.results import Curve

LABELLED_SCALES = 6  # with more points, their labels overlap
LINEAR_BELOW = 0.01  # scores of blocks range from about 0 to several nats
AXES = {
    BlockScore.LEFT_OUT: "increase of the loss without the block, nats per token",
    BlockScore.STREAM_CHANGE: "change of the residual stream",
}


def draw_curves(curves: Mapping[str, Curve], output: Path, *, tolerance: float, title: str | None = None) -> None:
    """Draw one line per curve and one panel per known set into `output`, whose extension sets the format.

    Up is more gain in the new domain; right is more loss of the known set. A point is a scale of the dial; the one
    nearest the origin is the smallest. All curves have the known sets of the first.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    pyplot = _pyplot()
    first = next(iter(curves.values()))
    known = list(first.known)
    figure, axes = pyplot.subplots(
        1, len(known), figsize=(4.6 * len(known), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, name in zip(axes.flat, known, strict=True):
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.axvline(tolerance, color="0.6", linewidth=0.8, linestyle=":")
        for label, curve in curves.items():
            scales = sorted(curve.losses)
            changes = [curve.losses[scale][name] - curve.losses[0.0][name] for scale in scales]
            gains = [curve.gain(scale) for scale in scales]
            axis.plot(changes, gains, marker="o", markersize=4, linewidth=1.5, label=label or None)
            if len(curves) == 1 and len(scales) <= LABELLED_SCALES:
                for scale, *place in zip(scales, changes, gains, strict=True):
                    axis.annotate(f"{scale:g}", place, textcoords="offset points", xytext=(6, -3), fontsize="small")
        axis.set(xlabel=f"change of the loss of {name}, nats per token")
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].set(ylabel=f"gain in {', '.join(first.new)}, nats per token")
    if len(curves) > 1:
        axes.flat[0].legend(frameon=False, fontsize="small")
    if title:
        figure.suptitle(title)
    _save(figure, output)


def draw_blocks(ranking: Ranking, output: Path) -> None:
    """Draw the score of every block into `output`, whose extension sets the format: one line for the mean over the
    known sets, one for the new sets. The chosen blocks are shaded. The scale is linear near 0, else logarithmic.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for number, block in enumerate(ranking.chosen):
        axis.axvspan(block - 0.5, block + 0.5, color="0.9", label=None if number else "copied")
    for label, names in (("known", ranking.known), ("new", ranking.new)):
        if names:
            means = ranking.mean(names)
            axis.plot(means, marker="o", markersize=4, linewidth=1.5, label=f"{label}: {', '.join(names)}")
    axis.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axis.set(xlabel="source block", ylabel=AXES[ranking.by])
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    _save(figure, output)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, output: Path) -> None:
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:
        raise ConfigError(f"{output}: {error}") from None
    finally:
        _pyplot().close(figure)
