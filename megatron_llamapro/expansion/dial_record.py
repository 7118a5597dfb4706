"""The dial: W0 + scale * (W1 - W0) between a model before and after training. Its range, and its record in a manifest.

Of an added block, only the output projections are dialed: without them it adds nothing, so W0 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_llamapro.config.errors import ConfigError

LARGEST_SCALE = 2.0

BlockScale = float | tuple[float, ...]
"""One scale for all, or one for each added block in the order of the layers."""


def block_scale(scale: float | Sequence[float], *, num_added_blocks: int) -> BlockScale:
    """Return the scale if it is valid: as one number if one is given, or if all are equal.

    Raises:
        ConfigError: a scale is not between 0 and `LARGEST_SCALE`, or their number is neither 1 nor that of the blocks.
    """
    scales = tuple(map(float, scale)) if isinstance(scale, Sequence) else (float(scale),)
    for value in scales:
        if not 0 <= value <= LARGEST_SCALE:
            raise ConfigError(
                f"added_block_scale is {value:g}: it must be from 0 (the original) through 1 (as trained) to "
                f"{LARGEST_SCALE:g} (further than trained)"
            )
    if len(scales) not in (1, num_added_blocks or 1):
        raise ConfigError(
            f"added_block_scale has {len(scales)} values, but the model has {num_added_blocks} added blocks: give one "
            "value, or one for each block"
        )
    return scales[0] if len(set(scales)) == 1 else scales


def scale_of_block(scale: BlockScale, index: int) -> float:
    """Return the scale of added block `index`, counted from 0."""
    return scale[index] if isinstance(scale, tuple) else scale


@dataclass(frozen=True)
class DialRecord:
    """The last dial of a checkpoint, and the factors of earlier ones. Training since then does not change it."""

    added_block_scale: BlockScale
    """Original tensors that were trained, and their adapters, have it too. Then it is one number."""
    undialed_hashes: Mapping[str, str]
    """`formats.adapters.undialed_hash` of every dialed tensor before the dial, by its Hugging Face name."""
    earlier: tuple[BlockScale, ...] = ()
    """The scales of earlier dials, first to last. The tensors have these factors too."""

    def of_block(self, index: int) -> float:
        """Return the scale of the last dial for added block `index`, counted from 0."""
        return scale_of_block(self.added_block_scale, index)

    def is_off(self, index: int) -> bool:
        """Return whether any dial set added block `index`, counted from 0, to 0."""
        return any(scale_of_block(scale, index) == 0 for scale in (self.added_block_scale, *self.earlier))

    def __str__(self) -> str:
        return ", then ".join(map(_text, (*self.earlier, self.added_block_scale)))

    @property
    def last(self) -> str:
        """The last dial, without the earlier ones."""
        return _text(self.added_block_scale)

    def to_json(self) -> dict:
        """Return plain data. `from_json` turns it back into an equal record."""
        return {
            "added_block_scale": _plain(self.added_block_scale),
            "earlier": [_plain(scale) for scale in self.earlier],
            "undialed_hashes": dict(self.undialed_hashes),
        }

    @classmethod
    def from_json(cls, data: Mapping, *, num_added_blocks: int) -> DialRecord:
        """Return the record that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the data is not a record.
        """
        hashes = data["undialed_hashes"].items()
        if not all(isinstance(text, str) for pair in hashes for text in pair):
            raise TypeError("a hash is not text")
        scales = [_scale(value, num_added_blocks) for value in (*data["earlier"], data["added_block_scale"])]
        return cls(scales[-1], dict(hashes), tuple(scales[:-1]))


def _plain(scale: BlockScale) -> float | list[float]:
    return list(scale) if isinstance(scale, tuple) else scale


def _text(scale: BlockScale) -> str:
    return "× " + ", ".join(f"{value:g}" for value in (scale if isinstance(scale, tuple) else (scale,)))


def _scale(value: object, num_added_blocks: int) -> BlockScale:
    values = value if isinstance(value, list) else [value]
    if not all(type(each) in (int, float) and math.isfinite(each) for each in values):
        raise ValueError(f"scale {str(value)[:40]}")
    try:
        return block_scale(values, num_added_blocks=num_added_blocks)
    except ConfigError as error:
        raise ValueError(str(error)) from None
