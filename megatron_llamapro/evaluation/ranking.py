"""Which source blocks to copy, by their scores on held-out sets. Pure.

A block that matters little to text the model knows leaves room: ADEPT (arXiv 2510.10071) copies the blocks that are
least critical to general text, where LLaMA Pro spreads the copies evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_llamapro.evaluation.results import SetLoss, aligned, losses_json
from megatron_llamapro.expansion.plan import positions_after


class BlockScore(str, Enum):
    """What a block is ranked by. Less means that the block matters less."""

    LEFT_OUT = "left_out"
    """How much the set's loss increases if the block is left out, in nats per token."""
    STREAM_CHANGE = "stream_change"
    """Root mean square of what the block adds to a token's residual stream, relative to that token's stream."""


@dataclass(frozen=True)
class SetScores:
    """The scores of every block on one set; the first is block 0's."""

    whole: SetLoss
    """The loss of the model with all its blocks."""
    left_out: Sequence[float]
    stream_change: Sequence[float]

    def of(self, score: BlockScore) -> Sequence[float]:
        """Return one score of every block."""
        return getattr(self, score.value)


@dataclass(frozen=True)
class Ranking:
    """The scores of every block on known and new sets, and the blocks to copy."""

    scores: Mapping[str, SetScores]
    """By set: the known ones and the new ones."""
    known: Sequence[str]
    """Names of the sets of what the model knew. They alone decide."""
    new: Sequence[str]
    by: BlockScore
    num_added_blocks: int

    @property
    def num_blocks(self) -> int:
        return len(self.scores[self.known[0]].left_out)

    def mean(self, names: Sequence[str]) -> list[float]:
        """Return every block's score, the mean over these sets."""
        of_each = [self.scores[name].of(self.by) for name in names]
        return [sum(of_block) / len(names) for of_block in zip(*of_each, strict=True)]

    @property
    def chosen(self) -> tuple[int, ...]:
        """The source blocks with the least score, ascending. Of two equal ones, the first. A score that is not a number
        counts as the largest."""
        known = self.mean(self.known)
        ranked = sorted(range(self.num_blocks), key=lambda block: (math.isnan(known[block]), known[block]))
        return tuple(sorted(ranked[: self.num_added_blocks]))

    @property
    def positions(self) -> tuple[int, ...]:
        """Where the copies of the chosen blocks go, in the expanded model: each right after its block."""
        return positions_after(self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return the losses of the whole model, both scores of every block, and the choice."""
        chosen = self.chosen
        return {
            "known": [*self.known],
            "new": [*self.new],
            "losses": losses_json({name: scores.whole for name, scores in self.scores.items()}),
            "blocks": [
                {
                    "block": block,
                    "chosen": block in chosen,
                    "scores": {
                        name: {score.value: scores.of(score)[block] for score in BlockScore}
                        for name, scores in self.scores.items()
                    },
                }
                for block in range(self.num_blocks)
            ],
            "by": self.by.value,
            "chosen": [*chosen],
            "positions": [*self.positions],
        }

    def table(self) -> str:
        """Return one row per block: both scores of each set, and whether the block is chosen."""
        chosen = self.chosen
        rows = [("block", *(cell for name in self.scores for cell in (f"{name} left_out", "stream_change")), "")]
        for block in range(self.num_blocks):
            cells = (
                cell
                for scores in self.scores.values()
                for cell in (f"{scores.left_out[block]:+.4f}", f"{scores.stream_change[block]:.4f}")
            )
            rows.append((str(block), *cells, "chosen" if block in chosen else ""))
        return aligned(rows, num_left=0)
