"""Whether a config.json is to us what it is to transformers: our frequencies, shapes and logits beside a reading by
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
    """A configuration that is accepted. A `checkpoint.sources.TensorSource` too."""

    shape: ModelShape

    @classmethod
    def of(cls, config: dict) -> OurReading | None:
        """None where it is refused; that is one line."""
        try:
            return cls(model_shape(config))
        except CheckpointError as refusal:
            assert "\n" not in str(refusal)
            return None

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of every weight, under Hugging Face's name."""
        return hf_shapes(self.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The weight that `transformers_reading` gives its model."""
        return weight(name, self.shapes[name])

    def difference(self, theirs: dict) -> str | None:
        """What of transformers' reading is another; None where nothing is."""
        if "error" in theirs:
            return f"transformers fails: {theirs['error']}"
        if not _alike(inverse_frequencies(self.shape), theirs["frequencies"], rtol=1e-6, atol=0):
            return "frequencies differ"
        # float32 on both sides, by other kernels; a misread field moves logits by 1e-2 and more.
        if "logits" in theirs and not _alike(
            logits(self, torch.tensor(TOKENS)), theirs["logits"], rtol=1e-4, atol=1e-4
        ):
            return "logits differ"
        return None


def _alike(ours: torch.Tensor, theirs: list, **tolerance: float) -> bool:
    other = torch.tensor(theirs)
    return ours.shape == other.shape and torch.allclose(ours, other, **tolerance)
