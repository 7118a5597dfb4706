"""Layer specs: the modules that a layer is built from. They are Transformer Engine's if it is usable, else
megatron.core's linears with our norm, attention and activation, which need only torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import TransformerImpl
from megatron_llamapro.model.attention import LlamaSelfAttention, SDPACoreAttention
from megatron_llamapro.model.norm import RMSNorm
from megatron_llamapro.model.swiglu import swiglu


def residual_add(training: bool, fused: bool) -> Callable:
    """Replace megatron.core's `get_bias_dropout_add` in models without dropout: add the output, and its bias if any."""
    return _residual_add


def _residual_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
    output, bias = output_with_bias
    return residual + (output if bias is None else output + bias)


def local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return a block of megatron.core's linears with our norm and attention. Its checkpoint keys are those of
    Transformer Engine's layers, which fuse a norm with the next linear. So either loads the other's checkpoints."""
    keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    query_key_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=LlamaSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPACoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_feed_forward(config),
            mlp_bda=residual_add,
            sharded_state_dict_keys_map=keys_map,
        ),
    )


def _feed_forward(config: TransformerConfig) -> ModuleSpec:
    linears = MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        activation_func=swiglu if config.use_te_activation_func else None,
        linear_fc2=RowParallelLinear,
    )
    if config.num_moe_experts is None:
        return ModuleSpec(module=MLP, submodules=linears)
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))


def uses_transformer_engine(transformer_impl: TransformerImpl) -> bool:
    """Return whether layers come from Transformer Engine.

    Raises:
        ConfigError: it is requested but not usable.
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
    """Return the specs of the layers of this rank's (virtual) stage."""
    if uses_transformer_engine(transformer_impl):
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.num_moe_experts is not None,
            qk_layernorm=config.qk_layernorm,
        )
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[local_layer_spec(config)] * num_layers, layer_norm=RMSNorm)
