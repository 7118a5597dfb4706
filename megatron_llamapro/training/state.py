"""What moves while a run trains. Everything else about a run is fixed at its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingState:
    """Progress; saved with every checkpoint."""

    iteration: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Samples of the data's order that were trained on; with the order it is the whole state of the data."""
