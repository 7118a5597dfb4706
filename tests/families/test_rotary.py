"""Rotary frequencies equal those of transformers for any config.json."""

from __future__ import annotations

import pytest
import torch

from megatron_llamapro.families.hf_config import model_shape
from megatron_llamapro.families.rotary import inverse_frequencies

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_equal_transformers(rope: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, rope_parameters=ROPES[rope], max_position_embeddings=131072
    )
    ours = inverse_frequencies(model_shape(config.to_dict()))
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)
