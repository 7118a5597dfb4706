"""What an expansion adds: blocks somewhere, that begin in one of several ways, to be compared. Imports no torch.

Every one makes the block an identity; they differ in what it is a copy of, and in what is zeroed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_llamapro.config.errors import ExpansionError
from megatron_llamapro.expansion.plan import ExpansionPlan

Expand = Callable[[ExpansionPlan], ExpansionPlan]
"""From the plan of a model to the plan of the model with one more round of added blocks."""


class Init(str, Enum):
    """What an added block starts as."""

    COPY = "copy"
    """A copy of its source block, both output projections zeroed (the paper's)."""
    RANDOM = "random"
    """Normal with the model's initializer_range, norms 1, both output projections zeroed."""
    MEAN = "mean"
    """The mean of its source block and the one behind that, both output projections zeroed."""
    ZERO_NORM = "zero_norm"
    """A copy of its source block with its norms zeroed instead (staged training, Shen et al. 2022)."""

    @property
    def zeroes_norms(self) -> bool:
        """Whether it zeroes the norms, and not the output projections."""
        return self is Init.ZERO_NORM


@dataclass(frozen=True)
class Expansion:
    """A round of added blocks."""

    expand: Expand
    """Where they go."""
    init: Init = Init.COPY
    """What they begin as."""
    seed: int = 0
    """Of random blocks."""

    @classmethod
    def at(cls, *positions: int, init: Init = Init.COPY, seed: int = 0) -> Expansion:
        """Blocks at these positions of the expanded model, ascending."""
        return cls(lambda plan: plan.expand(positions), init, seed)


def check_init(init: Init, *, force: bool) -> None:
    """Raise `ExpansionError` for a way that cannot learn in the families that are known, unless forced."""
    if init is Init.ZERO_NORM and not force:
        raise ExpansionError(
            "init zero_norm cannot learn in a SwiGLU block: with its input at 0 the feed-forward is of second order, "
            "so its norm's gradient stays 0 (arXiv 2401.02415, section 3.2): take copy, or compare with --force"
        )
