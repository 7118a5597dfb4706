"""Refused model types, each with its reason: the part that the weight map or the model does not support.

An added block is an identity if it adds zero to the residual stream. Its output projections are zero, so nothing after
them may turn zero into something else. Imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Mapping

BIASES = "its output projections or norms have biases, which llamapro's model does not support"
SIDE_BY_SIDE = "its attention and feed-forward run in parallel, which llamapro's model does not support"
NORM_BEHIND = (
    "a norm follows each output projection: zeros make an identity (the RMSNorm of zero is zero), but that norm "
    "scales the first step of a zeroed projection up to full size, so the model would jump away from the original"
)
SCALED = "it scales embeddings, residuals or logits, which llamapro's model does not support"
OTHER_EXPERTS = "its experts are not laid out like Mixtral's (shared experts, other names, or dense blocks in between)"
FUSED = "its projections are stored fused, and the weight map has no rows for that"
OTHER_BLOCKS = "not every block is attention and feed-forward, each with one output projection"
PLUS_ONE = "its norms multiply by 1 + their weight and it scales embeddings, which llamapro's model does not support"
UNGATED = "its feed-forward has no gate, and llamapro's model has a gate in every feed-forward"
LATENT = "its keys and values come from a compressed latent, and the weight map has no rows for that"
INTERLEAVED = "its rotary embedding pairs neighbouring channels, but llamapro's model pairs the two halves of a head"
INNER_NORMS = "it has norms inside attention or feed-forward, and the weight map has no rows for them"
SINKS = "its attention has sinks, and the weight map has no rows for them"
SOME_WINDOWS = "its windows alternate by layer_types, which is supported for Qwen2 and Qwen3 only"
MORE_THAN_TEXT = "it reads more than text: save its language model alone, if that is one of these families"
UNEVEN = "its blocks differ in size, and llamapro's model has blocks of one size"

_TYPES: dict[str, str] = {
    BIASES: "gpt2 gpt_bigcode gpt_neo gpt_neox gptj opt bloom phi starcoder2 stablelm stablelm_epoch phimoe persimmon "
    "xglm codegen biogpt orion",
    SIDE_BY_SIDE: "falcon cohere cohere2 cohere2_moe",
    NORM_BEHIND: "olmo2 olmo3 flex_olmo gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text glm4 exaone4 "
    "afmoe",
    SCALED: "granite granitemoe granitemoeshared minicpm hyperclovax",
    OTHER_EXPERTS: "qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 llama4 llama4_text glm4_moe "
    "glm4_moe_lite ernie4_5_moe dots1 minimax_m2 longcat_flash exaone_moe hunyuan_v1_moe solar_open mellum jetmoe",
    FUSED: "phi3 phi3small qwen baichuan internlm2 chatglm glm dbrx",
    OTHER_BLOCKS: "mamba mamba2 falcon_mamba jamba rwkv xlstm recurrent_gemma qwen3_next qwen3_5 qwen3_5_text "
    "qwen3_5_moe qwen3_5_moe_text nemotron_h falcon_h1 bamba zamba zamba2 lfm2 lfm2_moe granitemoehybrid olmo_hybrid "
    "minimax kimi_linear",
    PLUS_ONE: "gemma vaultgemma",
    UNGATED: "arcee nemotron apertus jais2 nanochat",
    LATENT: "minicpm3 youtu",
    INTERLEAVED: "ernie4_5 helium",
    INNER_NORMS: "bitnet hunyuan_v1_dense",
    SINKS: "granite_swa mimo_v2_flash",
    SOME_WINDOWS: "ministral cwm",
    MORE_THAN_TEXT: "llava llava_next llava_onevision mllama mistral3 qwen2_vl qwen2_5_vl qwen3_vl qwen2_audio "
    "qwen2_5_omni internvl internvl_chat idefics2 idefics3 smolvlm paligemma phi4_multimodal pixtral voxtral",
    UNEVEN: "deci nemotron-nas openelm",
}
"""Reason → the model types that are refused for it."""

REFUSED: dict[str, str] = {
    **{model_type: reason for reason, types in _TYPES.items() for model_type in types.split()},
    "gpt_oss": "its output projections have biases, its attention has sinks, and its experts are not Mixtral's",
    "mpt": "its positions are linear biases of attention (ALiBi), which llamapro's model does not support",
    "olmo": "its LayerNorms have no weights, which llamapro's model does not support",
    "smollm3": "some of its layers have no rotary embedding, and llamapro's model has one in every layer",
    "ministral3": "it scales queries by their position, which llamapro's model does not support",
    "seed_oss": "it has dropout in attention and in the residual stream, and its own flag for biases of the output "
    "projection",
    "diffllama": "its attention is the difference of two, which llamapro's model does not support",
    "internlm": "its attention has biases in all projections and its feed-forward has none, which megatron.core's "
    "model does not support",
    "Yi": "it is the first release, with its own code and names: use the newer files of that model, with model_type "
    "llama",
}
"""model_type → reason."""

_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Fields in which a model of more than text describes its language model."""


def reason_for(config: Mapping) -> str | None:
    """Return the reason for refusing a `model_type` without a family, or None if no reason is known."""
    model_type = config.get("model_type")
    reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
    if reason is None and any(isinstance(config.get(name), Mapping) for name in _LANGUAGE_MODELS):
        return MORE_THAN_TEXT
    return reason
