"""Which modules a layer is built from: Transformer Engine's where it is there, else megatron.core's linears with our
norm and attention, which need nothing but torch."""

from __future__ import annotations

import functools
import importlib.util

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import TransformerImpl


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, for any split of the sequence.

    megatron.core's wrapper of torch's norm refuses sequence parallelism; all it needs is the mark on the weight that
    has `finalize_model_grads` sum its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, h] → the same shape"""
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class SDPACoreAttention(torch.nn.Module):
    """Causal attention, with a sliding window where the layer has one, by torch's fused kernels, without copying keys
    and values to every query head."""

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


@functools.lru_cache(maxsize=2)  # the same for every layer of a step, and of the next
def window_mask(sequence: int, tokens_before: int, device: torch.device) -> torch.Tensor:
    """Which keys each query sees: itself and `tokens_before` before it; [query, key], bool."""
    position = torch.arange(sequence, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance <= tokens_before)


def local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """A block of megatron.core's linears and our norm and attention. Its checkpoint keys are those of Transformer
    Engine's layers, which fuse a norm with the linear behind it, so that either loads what the other saved."""
    keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    query_key_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPACoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_feed_forward(config),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys_map,
        ),
    )


def _feed_forward(config: TransformerConfig) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if config.num_moe_experts is None:
        return ModuleSpec(module=MLP, submodules=linears)
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))


def uses_transformer_engine(transformer_impl: TransformerImpl) -> bool:
    """Whether layers come from Transformer Engine.

    Raises:
        ConfigError: it was asked for and is not usable here.
    """
    usable = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if transformer_impl == "transformer_engine" and not usable:
        raise ConfigError(
            "model.transformer_impl is transformer_engine, which needs a CUDA device and the transformer_engine "
            "package: install it, or set model.transformer_impl to local"
        )
    return usable and transformer_impl != "local"


def block_spec(
    config: TransformerConfig, *, transformer_impl: TransformerImpl, vp_stage: int | None
) -> TransformerBlockSubmodules | ModuleSpec:
    """The layers of this rank's (virtual) stage."""
    if uses_transformer_engine(transformer_impl):
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.num_moe_experts is not None,
            qk_layernorm=config.qk_layernorm,
        )
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[local_layer_spec(config)] * num_layers, layer_norm=RMSNorm)
