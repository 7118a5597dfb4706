"""What a dataset gives for one row of a batch."""

from __future__ import annotations

import torch

Sample = dict[str, torch.Tensor]
"""tokens, labels, position_ids: int64 [s]; loss_mask: float32 [s]."""


def sample_of(stream: torch.Tensor, loss_mask: torch.Tensor) -> Sample:
    """`stream` [s + 1], whose every token is the label of the one before; `loss_mask` [s], of the labels."""
    return {
        "tokens": stream[:-1].contiguous(),
        "labels": stream[1:].contiguous(),
        "loss_mask": loss_mask.contiguous(),
        "position_ids": torch.arange(len(loss_mask)),
    }
