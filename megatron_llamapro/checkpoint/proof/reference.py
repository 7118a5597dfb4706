"""The forward pass of every family in plain torch, one block at a time. Weights are read when they are needed.

For proofs. It needs neither transformers nor megatron.core, and memory for one block only. Everything is computed in
float32, whatever the type of the stored weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional

from megatron_llamapro.checkpoint.formats.open import TensorSource
from megatron_llamapro.families.rotary import inverse_frequencies
from megatron_llamapro.families.shape import ModelShape

ReadWeight = Callable[[str], torch.Tensor]
"""Returns a block's weight, given its name in the block."""

ApplyLinear = Callable[[torch.Tensor, str], torch.Tensor]
"""Applies a block's linear (and its bias, if it has one), given its input and its name in the block."""

_HEAD_ROWS = 8192  # vocabulary rows that are converted to float32 at once


@torch.no_grad()
def logits(model: TensorSource, tokens: torch.Tensor) -> torch.Tensor:
    """Return the model's logits: tokens [b, s] → [b, s, vocabulary], float32."""
    shape = model.shape
    angles = torch.outer(torch.arange(tokens.shape[1]), inverse_frequencies(shape))  # [s, d / 2]
    rotation = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    hidden = embedded(model, tokens)
    for layer in range(shape.num_layers):
        hidden = _block(model, layer, hidden, rotation)
    hidden = _norm(hidden, model.tensor("model.norm.weight"), shape)
    return projected(model, hidden, is_tied=shape.tie_word_embeddings)


def embedded(model: TensorSource, tokens: torch.Tensor) -> torch.Tensor:
    """Return the embedded tokens: [b, s] → [b, s, h], float32."""
    return model.tensor("model.embed_tokens.weight")[tokens].float()


def projected(model: TensorSource, hidden: torch.Tensor, *, is_tied: bool) -> torch.Tensor:
    """Return the logits: hidden [b, s, h] after the final norm → [b, s, vocabulary].

    If `is_tied`, the head is the embedding.
    """
    head = model.tensor("model.embed_tokens.weight" if is_tied else "lm_head.weight")
    return torch.cat([functional.linear(hidden, rows.float()) for rows in head.split(_HEAD_ROWS)], dim=-1)


def _block(
    model: TensorSource, layer: int, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Apply a block, [b, s, h] → [b, s, h]: x + Attention(Norm(x)), then x + FeedForward(Norm(x))."""

    def weight(name: str) -> torch.Tensor:
        return model.tensor(f"model.layers.{layer}.{name}.weight")

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = model.tensor(f"model.layers.{layer}.{name}.bias").float() if shape.add_bias_linear else None
        return functional.linear(x, weight(name).float(), bias)

    shape = model.shape
    normed = _norm(hidden, weight("input_layernorm"), shape)
    attended = _attention(model, layer, normed, rotation)
    hidden = hidden + linear(attended, "self_attn.o_proj")
    normed = _norm(hidden, weight("post_attention_layernorm"), shape)
    return hidden + (_mixture(normed, weight, shape) if shape.is_moe else _feed_forward(normed, linear))


def _attention(
    model: TensorSource, layer: int, normed: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Apply attention without the output projection: normed [b, s, h] → [b, s, heads · d]."""
    shape, block = model.shape, f"model.layers.{layer}.self_attn."
    heads = {}
    for part in ("q", "k", "v"):
        bias = model.tensor(f"{block}{part}_proj.bias").float() if shape.add_qkv_bias else None
        projected = functional.linear(normed, model.tensor(f"{block}{part}_proj.weight").float(), bias)
        heads[part] = projected.unflatten(-1, (-1, shape.kv_channels)).transpose(1, 2)  # [b, heads or groups, s, d]
    for part in ("q", "k"):
        if shape.qk_layernorm:
            heads[part] = _norm(heads[part], model.tensor(f"{block}{part}_norm.weight"), shape)
        heads[part] = _rotate(heads[part], rotation)
    position = torch.arange(normed.shape[1])
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (shape.window_of(layer) or normed.shape[1]))
    attended = functional.scaled_dot_product_attention(
        heads["q"], heads["k"], heads["v"], attn_mask=seen, enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(2)


def _feed_forward(normed: torch.Tensor, linear: ApplyLinear) -> torch.Tensor:
    inner = functional.silu(linear(normed, "mlp.gate_proj")) * linear(normed, "mlp.up_proj")
    return linear(inner, "mlp.down_proj")


def _mixture(normed: torch.Tensor, weight: ReadWeight, shape: ModelShape) -> torch.Tensor:
    """Apply each token's best experts, weighted by the softmax over their logits: [b, s, h] → [b, s, h]."""
    scores = functional.linear(normed, weight("block_sparse_moe.gate").float())  # [b, s, experts]
    chosen, experts = scores.topk(shape.moe_router_topk or 1, dim=-1)
    shares = torch.zeros_like(scores).scatter(-1, experts, chosen.softmax(-1))
    inner = []
    for expert in range(scores.shape[-1]):
        gate, up = (weight(f"block_sparse_moe.experts.{expert}.{part}") for part in ("w1", "w3"))
        inner.append(_gated(normed[shares[..., expert] > 0], gate, up))
    # A second loop, because a Megatron checkpoint stores w1 and w3 of all experts in one tensor, and all w2 in another.
    result = torch.zeros_like(normed)
    for expert, values in enumerate(inner):
        tokens = shares[..., expert] > 0
        output = functional.linear(values, weight(f"block_sparse_moe.experts.{expert}.w2").float())
        result[tokens] += shares[tokens][:, expert, None] * output
    return result


def _gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(functional.linear(x, gate.float())) * functional.linear(x, up.float())


def _norm(x: torch.Tensor, weight: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight.float(), shape.layernorm_epsilon)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply the rotary embedding to x [b, heads, s, d], with halves paired as in Hugging Face."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
