"""What a finished run is measured by: its losses along the dial, and the original's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import KNOWN_SETS, Cell
from megatron_llamapro.evaluation.results import Curve

TOLERANCE = 0.01
"""How much worse a known set may be, in nats per token."""
SCALES = (0.5, 0.75, 1.0)
"""Scales of the dial at which every run is evaluated. At 0 every run is the original, which is evaluated once."""
NUM_SAMPLES = 100
"""Samples of every held-out set: 25,600 tokens."""


def result_of(cell: Cell, sweep: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the committed result of a run: what it was, losses by scale, and the two figures that summarise them.

    `sweep` is what `llamapro sweep` wrote for it, `original` what `llamapro evaluate` wrote for the original.
    """
    names = [*cell.domains, *KNOWN_SETS]
    [before] = original["checkpoints"]
    losses = {0.0: {name: before["losses"][name]["loss"] for name in names}}
    for entry in sweep["scales"]:
        losses[entry["scale"]] = {name: entry["losses"][name]["loss"] for name in names}
    curve = Curve(losses, cell.domains, KNOWN_SETS)
    return {
        "cell": cell.to_json(),
        "losses": {f"{scale:g}": losses[scale] for scale in sorted(losses)},
        "gain": curve.gain(1.0),
        "worst_known": curve.worst_known(1.0),
        "gain_at_no_loss": curve.gain_at_no_loss(TOLERANCE),
    }


def curve_of(result: Mapping[str, Any]) -> Curve:
    """Return the curve of a committed result."""
    losses = {float(scale): of_scale for scale, of_scale in result["losses"].items()}
    return Curve(losses, result["cell"]["domain"].split("+"), KNOWN_SETS)


def read_results(folder: Path, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """Return the results of those runs that are finished."""
    paths = {cell: folder / f"{cell.name}.json" for cell in cells}
    return {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.exists()}
