"""Compares our reading of a config.json with transformers': frequencies, shapes and logits against the output of
`transformers_reading`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_llamapro.checkpoint.proof.reference import logits
from megatron_llamapro.checkpoint.tensors.weight_map import Shape, hf_shapes
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import model_shape
from megatron_llamapro.families.rotary import inverse_frequencies
from megatron_llamapro.families.shape import ModelShape
from transformers_reading import TOKENS, weight


@dataclass(frozen=True)
class OurReading:
    """An accepted configuration. It is also a `checkpoint.sources.TensorSource`."""

    shape: ModelShape

    @classmethod
    def of(cls, config: dict) -> OurReading | None:
        """Return our reading, or None if the configuration is refused. A refusal is one line."""
        try:
            return cls(model_shape(config))
        except CheckpointError as refusal:
            assert "\n" not in str(refusal)
            return None

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every weight, by its Hugging Face name."""
        return hf_shapes(self.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the weight that `transformers_reading` gives its model."""
        return weight(name, self.shapes[name])

    def difference(self, theirs: dict) -> str | None:
        """Return how transformers' reading differs, or None if it does not."""
        if "error" in theirs:
            return f"transformers fails: {theirs['error']}"
        if not _alike(inverse_frequencies(self.shape), theirs["frequencies"], rtol=1e-6, atol=0):
            return "frequencies differ"
        # Both sides compute in float32 with different kernels. A misread field moves logits by 1e-2 or more.
        if "logits" in theirs and not _alike(
            logits(self, torch.tensor(TOKENS)), theirs["logits"], rtol=1e-4, atol=1e-4
        ):
            return "logits differ"
        return None


def _alike(ours: torch.Tensor, theirs: list, **tolerance: float) -> bool:
    other = torch.tensor(theirs)
    return ours.shape == other.shape and torch.allclose(ours, other, **tolerance)
