"""Draws what a new domain gains against what each known set loses, along the dial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.evaluation.results import Curve

LABELLED_SCALES = 6  # with more points, their labels overlap


def draw_curves(curves: Mapping[str, Curve], output: Path, *, tolerance: float, title: str | None = None) -> None:
    """Draw one line per curve and one panel per known set into `output`, whose extension sets the format.

    Up is more gain in the new domain; right is more loss of the known set. A point is a scale of the dial; the one
    nearest the origin is the smallest. All curves have the known sets of the first.

    Raises:
        ConfigError: matplotlib is not installed, or does not support the format.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:
        raise ConfigError(f"{output}: {error}") from None
    finally:
        pyplot.close(figure)
