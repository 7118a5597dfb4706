"""Shapes of tiny models, for tests that need no weights. Imports no torch."""

from __future__ import annotations

from typing import Any

from megatron_llamapro.families.shape import ModelShape


def tiny_shape(**fields: Any) -> ModelShape:
    """Return two dense blocks, two query groups of two heads, embeddings not tied; `fields` override the defaults."""
    return ModelShape(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "vocab_size": 131,
            "layernorm_epsilon": 1e-5,
            "max_position_embeddings": 64,
            "rotary_base": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            **fields,
        }
    )
