"""Inverse frequencies of rotary embeddings, as Hugging Face computes them from `config.json`.

megatron.core 0.16.1 scales with Llama 3.1's constants only; a checkpoint may name its own.
"""

from __future__ import annotations

import math

import torch

from megatron_llamapro.model.shape import ModelShape, RopeScaling


def inverse_frequencies(shape: ModelShape) -> torch.Tensor:
    """Frequency of every pair of head dimensions, float32, [kv_channels / 2], in radians a token."""
    exponent = torch.arange(0, shape.kv_channels, 2, dtype=torch.int64).to(torch.float32) / shape.kv_channels
    frequencies = 1.0 / (shape.rotary_base**exponent)
    if shape.rope_scaling is None:
        return frequencies
    return _SCALE[shape.rope_scaling.rope_type](frequencies, shape.rope_scaling)


def _scale_linear(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Positions divided by `factor`."""
    return frequencies / scaling.factor


def _scale_llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(is_between, between, scaled)


_SCALE = {"linear": _scale_linear, "llama3": _scale_llama3}
