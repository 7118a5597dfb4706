"""Model types that are refused, with the reason: what of them the weight map and the model do not have.

An added block is an identity where what it adds to the residual is zero: its output projections are, and nothing
behind them turns zero into something else. Imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

BIASES = "its output projections or norms have biases, which the model here does not build"
SIDE_BY_SIDE = "its attention and feed-forward run side by side, which the model here does not build"
NORM_BEHIND = (
    "a norm stands behind each output projection: zeros make an identity (the RMSNorm of zero is zero), but that norm "
    "blows the first step of a zeroed projection up to full size, so the model would leap away from what it was"
)
SCALED = "it scales embeddings, residuals or logits by factors that the model here does not have"
OTHER_EXPERTS = "its experts are laid out otherwise than Mixtral's (shared ones, other names, dense blocks between)"
FUSED = "its projections are stored fused, and the weight map has no rows for that"
OTHER_BLOCKS = "not every block is attention and feed-forward, each with one output projection"
PLUS_ONE = "its norms multiply by 1 + their weight and its embeddings are scaled, which the model here does not do"
UNGATED = "its feed-forward has no gate, and the model here builds gated ones only"
LATENT = "its keys and values come from a compressed latent, which the weight map has no rows for"
INTERLEAVED = "its rotary embedding turns neighbouring channels, where the model here turns halves"
INNER_NORMS = "it has norms inside attention or feed-forward, which the weight map has no rows for"
SINKS = "its attention has sinks, which the weight map has no rows for"
SOME_WINDOWS = "its windows alternate by layer_types, which is read for Qwen2 and Qwen3 only"
MORE_THAN_TEXT = "it reads more than text: save its language model alone, if that is one of these families"
UNEVEN = "its blocks differ in size, and the model here has blocks of one size"

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
"""Reason → the model types that it is the reason for."""

REFUSED: dict[str, str] = {
    **{model_type: reason for reason, types in _TYPES.items() for model_type in types.split()},
    "gpt_oss": "its output projections have biases, its attention has sinks, and its experts are not Mixtral's",
    "mpt": "its positions are linear biases of attention (ALiBi), which the model here does not have",
    "olmo": "its LayerNorms have no weights, which the model here does not build",
    "smollm3": "some of its layers have no rotary embedding, which the model here gives to all",
    "ministral3": "it scales queries by their position, which the model here does not do",
    "seed_oss": "it drops parts of attention and of the residual stream at random, and has a flag of its own for "
    "biases of the output projection",
    "diffllama": "its attention is the difference of two, which the model here does not build",
    "internlm": "its attention has biases in all projections and its feed-forward in none, which megatron.core's model "
    "cannot have",
    "Yi": "it is the first release, with code and names of its own: take the newer files of that model, whose "
    "model_type is llama",
}
"""model_type → reason."""

_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Where a model of more than text says what its language model is."""


def reason_for(config: Mapping) -> str | None:
    """Why a model of a `model_type` that is no known family is refused; None where that is not known."""
    model_type = config.get("model_type")
    reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
    if reason is None and any(isinstance(config.get(name), Mapping) for name in _LANGUAGE_MODELS):
        return MORE_THAN_TEXT
    return reason
