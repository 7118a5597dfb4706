"""Builds `megatron.core`'s GPTModel from the shape of a Hugging Face checkpoint."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from megatron_llamapro.config.pipeline_stages import stage_layers, to_megatron_layout
from megatron_llamapro.config.schema import CrossEntropy, ModelConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_llamapro.config.values import DTYPES
from megatron_llamapro.families.rotary import inverse_frequencies
from megatron_llamapro.families.shape import ModelShape, padded_vocab_size
from megatron_llamapro.model.attention import RotaryTables
from megatron_llamapro.model.loss import give_loss
from megatron_llamapro.model.spec import block_spec, uses_transformer_engine
from megatron_llamapro.runtime.upstream import become

PARAMS_DTYPE: dict[str, torch.dtype] = {precision: getattr(torch, dtype) for precision, dtype in DTYPES.items()}

# Fields of ModelShape that TransformerConfig has under the same name.
_SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "add_qkv_bias",
    "add_bias_linear",
    "qk_layernorm",
    "num_moe_experts",
    "window_size",
)

# Dimension along which megatron.core shards a module's weight over tensor-parallel ranks.
_PARTITION_DIMENSION = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}

# Settings that make a megatron.core transformer a LLaMA; all families share them.
_LLAMA = {
    "normalization": "RMSNorm",
    "activation_func": silu,
    "gated_linear_unit": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


# As transformers' Mixtral: softmax over the chosen experts, no dropped tokens, no loss but the language model's.
# (The load of a frozen router cannot be balanced, and a copied router starts out balanced.)
_EXPERTS = {
    "moe_router_pre_softmax": False,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_token_dispatcher_type": "allgather",
}


_KEEP_ALL = RecomputeConfig()


class LlamaModel(GPTModel):
    """GPTModel whose output layer computes the loss and whose padded vocabulary entries get no probability."""

    def __init__(self, *args, true_vocab_size: int, cross_entropy: CrossEntropy, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.loss_in_output_layer = cross_entropy != "plain"
        if self.post_process and self.loss_in_output_layer:
            give_loss(self.output_layer, vocab_size=true_vocab_size, cross_entropy=cross_entropy)

    def _postprocess(self, hidden_states: torch.Tensor, *, labels: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """hidden_states [s, b, h] → loss of every token [b, s]; without labels, logits [b, s, vocabulary]. Stages
        before the last return the hidden states unchanged."""
        if labels is None or not self.post_process or not self.loss_in_output_layer:
            return super()._postprocess(hidden_states, labels=labels, **kwargs)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=tied, labels=labels)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, padded vocabulary / tensor ranks] → loss of every token, [b, s]."""
        entries = logits.shape[-1]
        real_entries = self.true_vocab_size - self.pg_collection.tp.rank() * entries
        if real_entries < entries:
            logits[..., max(real_entries, 0) :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)


def transformer_config(
    shape: ModelShape,
    *,
    parallel: ParallelConfig,
    precision: Precision,
    transformer_impl: str,
    recompute: RecomputeConfig = _KEEP_ALL,
) -> TransformerConfig:
    """Return megatron.core's configuration of the model and of its parallelism."""
    dtype = PARAMS_DTYPE[precision]
    pipelined = parallel.pipeline_model_parallel_size > 1
    counts = stage_layers(parallel, shape.num_layers)
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        **{name: getattr(shape, name) for name in _SHAPE_FIELDS},
        **_LLAMA,
        **_experts(shape, grouped=transformer_impl == "transformer_engine"),
        window_attn_skip_freq=list(shape.window_attn_skip_freq) if shape.window_attn_skip_freq else None,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=to_megatron_layout(counts) if pipelined else None,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        recompute_modules=list(recompute.modules),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        transformer_impl="transformer_engine" if transformer_impl == "transformer_engine" else "local",
        perform_initialization=False,  # every weight comes from a checkpoint
        calculate_per_token_loss=True,  # every token weighs the same, whatever its micro-batch
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=on_gpu,  # gloo has no batched sends
        overlap_p2p_comm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        use_te_activation_func=not on_gpu,  # megatron.core's flag for "the layer spec gives the activation"
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],
        # One checkpoint key per layer: stacked layers cannot hold optimizer state for only some of them.
        hetereogenous_dist_checkpoint=True,
    )


def _experts(shape: ModelShape, *, grouped: bool) -> dict:
    if not shape.is_moe:
        return {}
    return {
        **_EXPERTS,
        "moe_router_topk": shape.moe_router_topk,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_grouped_gemm": grouped,
    }


def build_model(
    shape: ModelShape,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig = _KEEP_ALL,
) -> list[LlamaModel]:
    """Return this rank's part of the model: one chunk, or one per virtual stage. Weights are not initialised.

    Model-parallel groups must exist (`runtime.distributed.start_model_parallel`).
    """
    impl = "transformer_engine" if uses_transformer_engine(model.transformer_impl) else "local"
    config = transformer_config(
        shape, parallel=parallel, precision=precision, transformer_impl=impl, recompute=recompute
    )
    virtual_stages = range(parallel.virtual_pipeline_model_parallel_size or 1)
    is_virtual = parallel.virtual_pipeline_model_parallel_size is not None
    return [
        _build_chunk(shape, config, model=model, vp_stage=stage if is_virtual else None) for stage in virtual_stages
    ]


def _build_chunk(
    shape: ModelShape, config: TransformerConfig, *, model: ModelConfig, vp_stage: int | None
) -> LlamaModel:
    from megatron.core import parallel_state

    vocab_size = padded_vocab_size(
        shape.vocab_size,
        divisible_by=model.make_vocab_size_divisible_by,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
    )
    chunk = LlamaModel(
        config,
        block_spec(config, transformer_impl=model.transformer_impl, vp_stage=vp_stage),
        vocab_size,
        shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        vp_stage=vp_stage,
        true_vocab_size=shape.vocab_size,
        cross_entropy=model.cross_entropy,
    )
    chunk.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(chunk.rotary_pos_emb.inv_freq.device)
    if config.transformer_impl == "local":
        become(chunk.rotary_pos_emb, RotaryTables).dtype = config.params_dtype
    _mark_tensor_parallel(chunk)
    return chunk


def _mark_tensor_parallel(chunk: LlamaModel) -> None:
    """Mark the weights that are sharded over tensor-parallel ranks, and along which dimension.

    megatron.core does this when it initialises a weight, a step that we skip. Without the marks it treats every
    sharded weight as a copy, and the global gradient norm misses all ranks but the first.
    """
    for module in chunk.modules():
        for kind, dimension in _PARTITION_DIMENSION.items():
            if isinstance(module, kind) and module.weight is not None:
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dimension, stride=1)
