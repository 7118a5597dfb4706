"""A LLaMA's forward pass in plain torch, one block at a time, its weights read as they are needed.

For proofs: it needs neither transformers nor megatron.core, and no more memory than one block. Everything is
computed in float32, whatever the weights are stored in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from megatron_llamapro.checkpoint.sources import TensorSource
from megatron_llamapro.model.families import ModelShape
from megatron_llamapro.model.rotary import inverse_frequencies

_HEAD_ROWS = 8192  # entries of the vocabulary that are turned to float32 at once


@torch.no_grad()
def logits(model: TensorSource, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [b, s] → logits [b, s, vocabulary], float32."""
    shape = model.shape
    angles = torch.outer(torch.arange(tokens.shape[1]), inverse_frequencies(shape))  # [s, d / 2]
    rotation = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    hidden = model.tensor("model.embed_tokens.weight")[tokens].float()
    for layer in range(shape.num_layers):
        hidden = _block(model, layer, hidden, rotation)
    hidden = _norm(hidden, model.tensor("model.norm.weight"), shape)
    head = model.tensor("model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight")
    return torch.cat([functional.linear(hidden, rows.float()) for rows in head.split(_HEAD_ROWS)], dim=-1)


def _block(
    model: TensorSource, layer: int, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """hidden [b, s, h] → [b, s, h]: x + Attention(Norm(x)), then x + FeedForward(Norm(x))."""

    def weight(name: str) -> torch.Tensor:
        return model.tensor(f"model.layers.{layer}.{name}.weight")

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight(name).float())

    shape = model.shape
    normed = _norm(hidden, weight("input_layernorm"), shape)
    query, key, value = (
        project(f"self_attn.{part}_proj", normed).unflatten(-1, (-1, shape.kv_channels)).transpose(1, 2)
        for part in ("q", "k", "v")
    )  # [b, heads or groups, s, d]
    query, key = _rotate(query, rotation), _rotate(key, rotation)
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    hidden = hidden + project("self_attn.o_proj", attended.transpose(1, 2).flatten(2))
    normed = _norm(hidden, weight("post_attention_layernorm"), shape)
    gated = functional.silu(project("mlp.gate_proj", normed)) * project("mlp.up_proj", normed)
    return hidden + project("mlp.down_proj", gated)


def _norm(x: torch.Tensor, weight: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    return functional.rms_norm(x, (shape.hidden_size,), weight.float(), shape.layernorm_epsilon)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of x [b, heads, s, d], halves paired as Hugging Face pairs them."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
