"""Causal self-attention on torch's fused kernels. Queries, keys and values are not copied between the projections and
the kernels."""

from __future__ import annotations

import functools

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention


class RotaryTables(RotaryEmbedding):
    """megatron.core's rotary embedding, but it returns cosines and sines, and computes them once per length instead of
    once per layer. It becomes the class of a model's `rotary_pos_emb`."""

    dtype: torch.dtype

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a model lives as long as the process)
    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: object = None
    ) -> torch.Tensor:
        """Return the cosines and the sines, [2, s, 1, 1, 1, d / 2]."""
        tables = torch.stack(self.get_cos_sin(max_seq_len, offset))
        return tables[:, :, None, None, None].to(self.dtype)


def rotate(
    first: torch.Tensor, second: torch.Tensor, tables: torch.Tensor, target: torch.Tensor, *, back: bool = False
) -> None:
    """Rotate the pairs (`first`, `second`), each [s, …, d / 2], by their positions' angles into the halves of `target`
    [s, …, d]; `back` rotates the other way. `second` may be the second half of `target` itself."""
    cosine, sine = tables
    into_first, into_second = target.chunk(2, dim=-1)
    sign = -1 if back else 1
    torch.mul(first, cosine, out=into_first).addcmul_(second, sine, value=-sign)
    torch.mul(second, cosine, out=into_second).addcmul_(first, sine, value=sign)


class _RotateAndSplit(torch.autograd.Function):
    """heads [s, b, groups, r + 2, d] → queries [s, b, groups, r, d], key and value [s, b, groups, 1, d].

    Queries and keys are rotated in place: `heads` is the output of a linear layer, and no backward pass reads it. The
    results are views of it. Once their gradients arrive, the attention no longer needs them, so the rotated gradients
    overwrite them. torch refuses a second backward pass, because the saved tensor has changed.
    """

    @staticmethod
    def forward(ctx, heads, tables):
        values = heads.detach()
        rotated = values[..., :-1, :]
        first, second = rotated.chunk(2, dim=-1)
        rotate(first.clone(), second, tables, rotated)
        ctx.save_for_backward(values, tables)
        return values[..., :-2, :], values[..., -2:-1, :], values[..., -1:, :]

    @staticmethod
    def backward(ctx, query_gradient, key_gradient, value_gradient):
        gradient, tables = ctx.saved_tensors
        rotate(*query_gradient.chunk(2, dim=-1), tables, gradient[..., :-2, :], back=True)
        rotate(*key_gradient.chunk(2, dim=-1), tables, gradient[..., -2:-1, :], back=True)
        gradient[..., -1:, :] = value_gradient
        return gradient, None


class _Rotate(torch.autograd.Function):
    """Rotates heads into a new tensor: [s, …, d] → the same shape."""

    @staticmethod
    def forward(ctx, heads, tables):
        ctx.save_for_backward(tables)
        result = torch.empty_like(heads)
        rotate(*heads.chunk(2, dim=-1), tables, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        (tables,) = ctx.saved_tensors
        result = torch.empty_like(gradient)
        rotate(*gradient.chunk(2, dim=-1), tables, result, back=True)
        return result, None


class LlamaSelfAttention(SelfAttention):
    """megatron.core's self-attention, for training only: its parameters and their names, with our forward pass."""

    def forward(self, hidden_states, attention_mask, *, rotary_pos_emb, **_: object):
        """hidden_states [s, b, h], rotary_pos_emb from `RotaryTables` → output [s, b, h], bias to add or None."""
        query, key, value = self._query_key_value(hidden_states, rotary_pos_emb)
        sequence, batch = hidden_states.shape[0] * self._sequence_ranks, hidden_states.shape[1]
        recomputed = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputed else self.core_attention
        context = attend(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type)
        return self.linear_proj(context.view(sequence, batch, -1))

    @property
    def _sequence_ranks(self) -> int:
        return self.world_size if self.config.sequence_parallel else 1

    def _query_key_value(
        self, hidden_states: torch.Tensor, tables: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries, keys and values in the core attention's layout, [s, batches, heads, d].

        They are views of one tensor that stores the heads group by group, so the queries of several groups cannot form
        one dimension. If a group has several queries, each group counts as a batch of its own instead.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = mixed.view(*mixed.shape[:2], groups, -1, size)
        if isinstance(self.q_layernorm, IdentityOp):
            parts = _RotateAndSplit.apply(heads, tables)
        else:
            queries, keys, values = heads.split((heads.shape[3] - 2, 1, 1), dim=3)
            parts = (
                _Rotate.apply(self.q_layernorm(queries), tables),
                _Rotate.apply(self.k_layernorm(keys), tables),
                values,
            )
        if parts[0].shape[3] == 1:
            return tuple(part.squeeze(3) for part in parts)
        return tuple(part.flatten(1, 2) for part in parts)


class SDPACoreAttention(torch.nn.Module):
    """Causal attention by torch's fused kernels, with the layer's sliding window if it has one. Keys and values are
    not copied to every query head."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.tokens_before = config.window_size[0] if has_window and config.window_size else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: object,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] → [s, b, heads · d]"""
        sequence, batch = query.shape[:2]
        mask = None
        if self.tokens_before is not None and sequence > self.tokens_before + 1:
            mask = window_mask(sequence, self.tokens_before, query.device)
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            dropout_p=self.dropout if self.training else 0.0,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


@functools.lru_cache(maxsize=2)  # all layers of all steps share it
def window_mask(sequence: int, tokens_before: int, device: torch.device) -> torch.Tensor:
    """Return a bool mask [query, key]: a query sees its own position and the `tokens_before` positions before it."""
    position = torch.arange(sequence, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance <= tokens_before)
