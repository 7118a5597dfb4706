"""Shapes in public models' config.json, as published on the Hugging Face hub: one row per model."""

from __future__ import annotations

from dataclasses import dataclass

TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA_3_1 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA_3_2 = {**LLAMA_3_1, **TIED, "rope_scaling": {**LLAMA_3_1["rope_scaling"], "factor": 32.0}}
LINEAR_4 = {"rope_scaling": {"type": "linear", "factor": 4.0}}
CONTEXT_2K, CONTEXT_4K, CONTEXT_8K, CONTEXT_16K = (
    {"max_position_embeddings": size} for size in (2048, 4096, 8192, 16384)
)
NO_WINDOW = {"sliding_window": None}
HEAD_64, HEAD_128, HEAD_256 = ({"head_dim": size} for size in (64, 128, 256))
NEMO = {"sliding_window": None, "head_dim": 128}
EXPERTS = {**NO_WINDOW, "num_local_experts": 8, "num_experts_per_tok": 2}


# Name; billions of parameters as published, or None; layers, hidden size, feed-forward size, heads, key-value heads,
# vocabulary, base of the rotary embedding (None: absent from config.json); other fields.
_ROWS: dict[str, tuple] = {
    "llama": (
        ("LLaMA 7B, Vicuna 7B v1.3, OpenLLaMA 7B", None, 32, 4096, 11008, 32, None, 32000, None, CONTEXT_2K),
        ("LLaMA 13B, OpenLLaMA 13B", None, 40, 5120, 13824, 40, None, 32000, None, CONTEXT_2K),
        ("LLaMA 30B", None, 60, 6656, 17920, 52, None, 32000, None, CONTEXT_2K),
        ("LLaMA 65B", None, 80, 8192, 22016, 64, None, 32000, None, CONTEXT_2K),
        ("OpenLLaMA 3B", None, 26, 3200, 8640, 32, None, 32000, None, CONTEXT_2K),
        ("Sheared-LLaMA 1.3B", None, 24, 2048, 5504, 16, None, 32000, None, CONTEXT_4K),
        ("Sheared-LLaMA 2.7B", None, 32, 2560, 6912, 20, None, 32000, None, CONTEXT_4K),
        ("Llama 2 7B, Vicuna 7B v1.5", 6.74, 32, 4096, 11008, 32, 32, 32000, None, {}),
        ("Llama 2 13B, Vicuna 13B v1.5", 13, 40, 5120, 13824, 40, 40, 32000, None, {}),
        ("Llama 2 70B", 69, 80, 8192, 28672, 64, 8, 32000, None, {}),
        ("LLaMA Pro 8B", None, 40, 4096, 11008, 32, 32, 32000, None, {}),
        ("Vicuna 7B v1.5 16K", None, 32, 4096, 11008, 32, 32, 32000, None, {**CONTEXT_4K, **LINEAR_4}),
        ("CodeLlama 7B", 6.74, 32, 4096, 11008, 32, 32, 32016, 1e6, CONTEXT_16K),
        ("CodeLlama 7B Python", None, 32, 4096, 11008, 32, 32, 32000, 1e6, CONTEXT_16K),
        ("CodeLlama 13B", 13, 40, 5120, 13824, 40, 40, 32016, 1e6, CONTEXT_16K),
        ("CodeLlama 34B", 33.7, 48, 8192, 22016, 64, 8, 32000, 1e6, CONTEXT_16K),
        ("TinyLlama 1.1B", 1.1, 22, 2048, 5632, 32, 4, 32000, None, CONTEXT_2K),
        ("SOLAR 10.7B", 10.7, 48, 4096, 14336, 32, 8, 32000, 10000.0, {}),
        ("Llama 3 8B", 8.03, 32, 4096, 14336, 32, 8, 128256, 5e5, CONTEXT_8K),
        ("Llama 3 70B", 70.6, 80, 8192, 28672, 64, 8, 128256, 5e5, CONTEXT_8K),
        ("Llama 3.1 8B, DeepSeek-R1-Distill-Llama 8B", 8.03, 32, 4096, 14336, 32, 8, 128256, 5e5, LLAMA_3_1),
        ("Llama 3.1 and 3.3 70B, DeepSeek-R1-Distill-Llama 70B", 70.6, 80, 8192, 28672, 64, 8, 128256, 5e5, LLAMA_3_1),
        ("Llama 3.1 405B", 406, 126, 16384, 53248, 128, 8, 128256, 5e5, LLAMA_3_1),
        ("Llama 3.2 1B", 1.24, 16, 2048, 8192, 32, 8, 128256, 5e5, {**LLAMA_3_2, **HEAD_64}),
        ("Llama 3.2 3B", 3.21, 28, 3072, 8192, 24, 8, 128256, 5e5, {**LLAMA_3_2, **HEAD_128}),
        ("Falcon3 1B", 1.67, 18, 2048, 8192, 8, 4, 131072, 1000042, HEAD_256),
        ("Falcon3 3B", 3.23, 22, 3072, 9216, 12, 4, 131072, 1000042, HEAD_256),
        ("Falcon3 7B", 7.46, 28, 3072, 23040, 12, 4, 131072, 1000042, HEAD_256),
        ("Falcon3 10B", 10.3, 40, 3072, 23040, 12, 4, 131072, 1000042, HEAD_256),
        ("SmolLM 135M", 0.135, 30, 576, 1536, 9, 3, 49152, 10000.0, TIED),
        ("SmolLM 360M", 0.362, 32, 960, 2560, 15, 5, 49152, 10000.0, TIED),
        ("SmolLM 1.7B", 1.71, 24, 2048, 8192, 32, 32, 49152, 10000.0, TIED),
        ("SmolLM2 135M", 0.135, 30, 576, 1536, 9, 3, 49152, 100000, TIED),
        ("SmolLM2 360M", 0.362, 32, 960, 2560, 15, 5, 49152, 100000, TIED),
        ("SmolLM2 1.7B", 1.71, 24, 2048, 8192, 32, 32, 49152, 130000, TIED),
        ("Yi 6B, Yi-1.5 6B", 6.06, 32, 4096, 11008, 32, 4, 64000, 5e6, {}),
        ("Yi 9B, Yi-1.5 9B", 8.83, 48, 4096, 11008, 32, 4, 64000, 5e6, {}),
        ("Yi 34B, Yi-1.5 34B", 34.4, 60, 7168, 20480, 56, 8, 64000, 5e6, {}),
        ("DeepSeek LLM 7B, DeepSeek-Coder 7B v1.5", 6.91, 30, 4096, 11008, 32, 32, 102400, 10000.0, {}),
        ("DeepSeek LLM 67B", None, 95, 8192, 22016, 64, 8, 102400, 10000.0, {}),
        ("DeepSeek-Coder 1.3B", 1.35, 24, 2048, 5504, 16, 16, 32256, 100000, {**CONTEXT_16K, **LINEAR_4}),
        ("DeepSeek-Coder 6.7B", 6.74, 32, 4096, 11008, 32, 32, 32256, 100000, {**CONTEXT_16K, **LINEAR_4}),
        ("DeepSeek-Coder 33B", 33.3, 62, 7168, 19200, 56, 8, 32256, 100000, {**CONTEXT_16K, **LINEAR_4}),
        ("Granite Code 3B", 3.48, 32, 2560, 10240, 32, 32, 49152, 10000, {**BIASES, **TIED}),
        ("Granite Code 8B", 8.05, 36, 4096, 14336, 32, 8, 49152, 10000, {**BIASES, **TIED}),
        ("Salamandra 2B", 2.25, 24, 2048, 5440, 16, 16, 256000, 10000.0, CONTEXT_8K),
        ("Salamandra 7B", 7.77, 32, 4096, 11008, 32, 8, 256000, 10000.0, CONTEXT_8K),
        ("EuroLLM 1.7B", 1.66, 24, 2048, 5632, 16, 8, 128000, 10000.0, {}),
        ("EuroLLM 9B", 9.15, 42, 4096, 12288, 32, 8, 128000, 10000.0, {}),
    ),
    "mistral": (
        ("Mistral 7B v0.1, Zephyr 7B", 7.24, 32, 4096, 14336, 32, 8, 32000, 10000.0, {"sliding_window": 4096}),
        ("Mistral 7B v0.2", 7.24, 32, 4096, 14336, 32, 8, 32000, 1e6, NO_WINDOW),
        ("Mistral 7B v0.3, Mathstral 7B", 7.25, 32, 4096, 14336, 32, 8, 32768, 1e6, NO_WINDOW),
        ("Mistral Nemo 12B", 12.2, 40, 5120, 14336, 32, 8, 131072, 1e6, NEMO),
        ("Ministral 8B 2410", 8.02, 36, 4096, 12288, 32, 8, 131072, 1e8, {"sliding_window": 32768, **HEAD_128}),
        ("Mistral Small 22B 2409, Codestral 22B", 22.2, 56, 6144, 16384, 48, 8, 32768, 1e6, NEMO),
        ("Mistral Small 24B 2501", 23.6, 40, 5120, 32768, 32, 8, 131072, 1e8, NEMO),
        ("Mistral Large 123B 2407", 123, 88, 12288, 28672, 96, 8, 32768, 1e6, NO_WINDOW),
    ),
    "mixtral": (
        ("Mixtral 8x7B", 46.7, 32, 4096, 14336, 32, 8, 32000, 1e6, EXPERTS),
        ("Mixtral 8x22B", 141, 56, 6144, 16384, 48, 8, 32768, 1e6, {**EXPERTS, "max_position_embeddings": 65536}),
    ),
    "qwen2": (
        ("Qwen1.5 0.5B", None, 24, 1024, 2816, 16, 16, 151936, 1e6, TIED),
        ("Qwen1.5 1.8B", 1.84, 24, 2048, 5504, 16, 16, 151936, 1e6, {}),
        ("Qwen1.5 4B", 3.95, 40, 2560, 6912, 20, 20, 151936, 5e6, {}),
        ("Qwen1.5 7B", 7.72, 32, 4096, 11008, 32, 32, 151936, 1e6, {}),
        ("Qwen1.5 14B", 14.2, 40, 5120, 13696, 40, 40, 152064, 1e6, {}),
        ("Qwen1.5 32B", 32.5, 64, 5120, 27392, 40, 8, 152064, 1e6, {}),
        ("Qwen1.5 72B", 72.3, 80, 8192, 24576, 64, 64, 152064, 1e6, {}),
        ("Qwen2 0.5B, Qwen2.5 0.5B", 0.494, 24, 896, 4864, 14, 2, 151936, 1e6, TIED),
        ("Qwen2 1.5B, Qwen2.5 1.5B", 1.54, 28, 1536, 8960, 12, 2, 151936, 1e6, TIED),
        ("DeepSeek-R1-Distill-Qwen 1.5B", 1.78, 28, 1536, 8960, 12, 2, 151936, 10000, {}),
        ("Qwen2.5 3B", 3.09, 36, 2048, 11008, 16, 2, 151936, 1e6, TIED),
        ("Qwen2 7B, Qwen2.5 7B", 7.62, 28, 3584, 18944, 28, 4, 152064, 1e6, {}),
        ("Qwen2.5-Math 7B, DeepSeek-R1-Distill-Qwen 7B", 7.62, 28, 3584, 18944, 28, 4, 152064, 10000, {}),
        ("Qwen2.5 14B, DeepSeek-R1-Distill-Qwen 14B", 14.8, 48, 5120, 13824, 40, 8, 152064, 1e6, {}),
        ("Qwen2.5 32B, QwQ 32B, DeepSeek-R1-Distill-Qwen 32B", 32.8, 64, 5120, 27648, 40, 8, 152064, 1e6, {}),
        ("Qwen2 72B, Qwen2.5 72B", 72.7, 80, 8192, 29568, 64, 8, 152064, 1e6, {}),
    ),
    "qwen3": (
        ("Qwen3 0.6B", None, 28, 1024, 3072, 16, 8, 151936, 1e6, {**TIED, **HEAD_128}),
        ("Qwen3 1.7B", None, 28, 2048, 6144, 16, 8, 151936, 1e6, {**TIED, **HEAD_128}),
        ("Qwen3 4B", 4.02, 36, 2560, 9728, 32, 8, 151936, 1e6, {**TIED, **HEAD_128}),
        ("Qwen3 4B 2507", 4.02, 36, 2560, 9728, 32, 8, 151936, 5e6, {**TIED, **HEAD_128}),
        ("Qwen3 8B", 8.19, 36, 4096, 12288, 32, 8, 151936, 1e6, HEAD_128),
        ("Qwen3 14B", 14.8, 40, 5120, 17408, 40, 8, 151936, 1e6, HEAD_128),
        ("Qwen3 32B", 32.8, 64, 5120, 25600, 64, 8, 151936, 1e6, HEAD_128),
    ),
}
# fmt: on

_FIELDS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rope_theta"),
)


@dataclass(frozen=True)
class PublicModel:
    """Models of one shape."""

    names: str
    billions: float | None
    config: dict


def _model(model_type: str, row: tuple) -> PublicModel:
    names, billions, *values, others = row
    fields = {name: value for name, value in zip(_FIELDS, values, strict=True) if value is not None}
    return PublicModel(names, billions, {"model_type": model_type, **CONTEXT_4K, **fields, **others})


MODELS = [_model(model_type, row) for model_type, rows in _ROWS.items() for row in rows]

REFUSED = (
    ("GPT-2, GPT-J, GPT-NeoX, Pythia, OPT, BLOOM", "gpt_neox", None),
    ("Phi-1, Phi-2", "phi", None),
    ("StableLM 2", "stablelm", None),
    ("StarCoder2", "starcoder2", None),
    ("Falcon 7B, 40B", "falcon", None),
    ("Command R, Aya", "cohere", None),
    ("MPT", "mpt", None),
    ("OLMo", "olmo", None),
    ("OLMo 2, OLMo 3", "olmo2", None),
    ("Gemma", "gemma", None),
    ("Gemma 2, Gemma 3, Gemma 4", "gemma3_text", None),
    ("GLM-4 0414", "glm4", None),
    ("EXAONE 4", "exaone4", None),
    ("Granite 3", "granite", None),
    ("MiniCPM", "minicpm", None),
    ("MiniCPM3", "minicpm3", None),
    ("SmolLM3", "smollm3", None),
    ("Phi-3, Phi-4", "phi3", None),
    ("Qwen (the first)", "qwen", None),
    ("Baichuan, Baichuan 2", "baichuan", None),
    ("InternLM (the first)", "internlm", None),
    ("InternLM2", "internlm2", None),
    ("Yi (files of the first days)", "Yi", None),
    ("Qwen1.5-MoE, Qwen3 30B A3B, 235B A22B", "qwen3_moe", None),
    ("Qwen3-Next, Qwen3.5", "qwen3_next", None),
    ("DeepSeek V2, V3, R1", "deepseek_v3", None),
    ("GLM-4.5", "glm4_moe", None),
    ("gpt-oss", "gpt_oss", None),
    ("Llama 4", "llama4", None),
    ("Ministral 3", "ministral3", None),
    ("Seed-OSS 36B", "seed_oss", None),
    ("AFM 4.5B", "arcee", None),
    ("Nemotron-4, Minitron 4B and 8B", "nemotron", None),
    ("Apertus", "apertus", None),
    ("ERNIE 4.5 0.3B", "ernie4_5", None),
    ("Hunyuan dense", "hunyuan_v1_dense", None),
    ("BitNet b1.58 2B4T", "bitnet", None),
    ("Code World Model 32B", "cwm", None),
    ("Mamba, Jamba, Falcon-H1, Nemotron-H, Zamba, LFM2, Granite 4 hybrids", "nemotron_h", None),
    ("LLaVA, Llama 3.2 Vision, Mistral Small 3.1, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL", "qwen2_5_vl", None),
    ("DeciLM, Llama-3.3-Nemotron-Super 49B", "nemotron-nas", None),
    ("DeepSeek-R1-0528-Qwen3 8B, long-context settings of Qwen2.5 and Qwen3", "qwen3", "yarn"),
)
"""Refused models: names, the model_type of one, and the type of rotary embedding if that is the reason."""
