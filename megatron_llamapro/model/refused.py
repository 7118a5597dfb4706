"""Model types that are refused, with the reason: what of them the weight map and the model do not have.

An added block is an identity where what it adds to the residual is zero: its output projections are, and nothing
behind them turns zero into something else. Imports nothing.
"""

from __future__ import annotations

_BIASES = "output projections and norms have biases there, and neither model nor weight map have norms with biases here"
_SIDE_BY_SIDE = "attention and feed-forward run side by side there, behind LayerNorms, and no such model is built here"
_NORM_BEHIND = (
    "a norm stands behind each output projection there: zeros make an identity (the RMSNorm of zero is zero), but that "
    "norm blows the first step of a zeroed projection up to full size, so the model would leap away from what it was"
)
_SCALED = "embeddings, residuals or logits are scaled by factors there that the model here does not have"
_OTHER_EXPERTS = "experts are laid out otherwise there than Mixtral's (shared ones, other names, dense blocks between)"
_FUSED = "projections are stored fused there, and the weight map has no rows for that"
_NOT_A_DECODER_BLOCK = "blocks are not attention and feed-forward there, each with one output projection"

REFUSED: dict[str, str] = {
    "gpt2": _BIASES,
    "gpt_bigcode": _BIASES,
    "gpt_neo": _BIASES,
    "gpt_neox": _BIASES,
    "gptj": _BIASES,
    "opt": _BIASES,
    "bloom": _BIASES,
    "phi": _BIASES,
    "starcoder2": _BIASES,
    "gpt_oss": "output projections of attention and experts have biases there, which the weight map has no rows for",
    "stablelm": "LayerNorms have biases there, which the weight map has no rows for",
    "falcon": _SIDE_BY_SIDE,
    "cohere": _SIDE_BY_SIDE,
    "cohere2": _SIDE_BY_SIDE,
    "mpt": "LayerNorms and positions (ALiBi) are not there what the model here has",
    "olmo": "LayerNorms have no weights there, and no such model is built here",
    "olmo2": _NORM_BEHIND,
    "olmo3": _NORM_BEHIND,
    "gemma2": _NORM_BEHIND,
    "gemma3": _NORM_BEHIND,
    "gemma3_text": _NORM_BEHIND,
    "glm4": _NORM_BEHIND,
    "gemma": "norms multiply by 1 + their weight there, and embeddings are scaled, which the model here does not do",
    "granite": _SCALED,
    "minicpm": _SCALED,
    "smollm3": "some layers have no rotary embedding there, which the model here gives to all",
    "phi3": _FUSED,
    "qwen": _FUSED,
    "baichuan": _FUSED,
    "internlm2": _FUSED,
    "chatglm": _FUSED,
    "glm": _FUSED,
    "dbrx": _FUSED,
    "qwen2_moe": _OTHER_EXPERTS,
    "qwen3_moe": _OTHER_EXPERTS,
    "olmoe": _OTHER_EXPERTS,
    "phimoe": _BIASES,
    "deepseek_v2": _OTHER_EXPERTS,
    "deepseek_v3": _OTHER_EXPERTS,
    "llama4": _OTHER_EXPERTS,
    "llama4_text": _OTHER_EXPERTS,
    "mamba": _NOT_A_DECODER_BLOCK,
    "mamba2": _NOT_A_DECODER_BLOCK,
    "jamba": _NOT_A_DECODER_BLOCK,
    "rwkv": _NOT_A_DECODER_BLOCK,
    "recurrent_gemma": _NOT_A_DECODER_BLOCK,
}
"""model_type → reason."""
