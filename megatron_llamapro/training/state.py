"""What moves while a run trains. Everything else about a run is fixed at its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    """How a step ended."""

    UPDATED = "updated"
    SKIPPED = "skipped"
    """Its loss or gradient norm was not finite, or the gradient exactly 0, so that it updated nothing."""
    LEFT_OUT = "left out"
    """Because training.skip_iterations names it."""


@dataclass
class TrainingState:
    """Progress; saved with every checkpoint."""

    iteration: int = 0
    """Steps done, those without an update too."""
    consumed_samples: int = 0
    """Samples of the data's order that these steps stand for; with the order it is the whole state of the data."""
    skipped_steps: list[int] = field(default_factory=list)
    """The steps that updated nothing, counted from 1."""
    skipped_in_a_row: int = 0
    """Those since the last update that were not left out."""

    @property
    def num_updates(self) -> int:
        """Steps that the optimizer took."""
        return self.iteration - len(self.skipped_steps)

    def end_step(self, outcome: Outcome, *, num_samples: int) -> None:
        """Count a step of `num_samples`."""
        self.iteration += 1
        self.consumed_samples += num_samples
        if outcome is not Outcome.UPDATED:
            self.skipped_steps.append(self.iteration)
        if outcome is not Outcome.LEFT_OUT:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome is Outcome.SKIPPED else 0
