"""A model's shape in numbers. Imports nothing of this package, and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts."""

    rope_type: str
    """linear or llama3."""
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """The numbers that determine a model's computation and its tensors' shapes, in megatron.core's spelling."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    add_qkv_bias: bool = False
    add_bias_linear: bool = False
    """Biases in all linears of a block; `add_qkv_bias` is then true too."""
    qk_layernorm: bool = False
    num_moe_experts: int | None = None
    """None: one feed-forward per block. Otherwise each expert has size `ffn_hidden_size`."""
    moe_router_topk: int | None = None
    window_size: tuple[int, int] | None = None
    """How many tokens before and after itself a token attends to. None: all before it."""
    window_attn_skip_freq: tuple[int, ...] | None = None
    """Per layer, 1 if it has the window, else 0 (megatron.core's name and values). None: all layers have it."""

    @property
    def is_moe(self) -> bool:
        """Whether every block has experts."""
        return self.num_moe_experts is not None

    @property
    def is_dense(self) -> bool:
        """Whether every block has one feed-forward."""
        return self.num_moe_experts is None

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a token of this layer attends to, including itself. None: all before it."""
        if self.window_size is None or (self.window_attn_skip_freq and not self.window_attn_skip_freq[layer]):
            return None
        return self.window_size[0] + 1

    def with_layers(self, layers: Sequence[int]) -> ModelShape:
        """Return the shape of a model that consists of these layers of this model."""
        windows = self.window_attn_skip_freq
        picked = None if windows is None else tuple(windows[layer] for layer in layers)
        return replace(self, num_layers=len(layers), window_attn_skip_freq=picked)


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """`vocab_size` rounded up so that every tensor-parallel rank holds a multiple of `divisible_by`: rows of embedding
    and head over all ranks, as Megatron-LM pads them."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
