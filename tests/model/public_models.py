"""What public models' config.json say of their shape, as published on the Hugging Face hub: facts, a row a model.

A row is (name, layers, hidden, feed-forward, heads, key-value heads, vocabulary, RoPE base, other fields). Fields that
do not decide a shape (context length, epsilon) are left out where they are the family's default.
"""

from __future__ import annotations

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
LINEAR_4 = {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}
NO_WINDOW = {"sliding_window": None}
EXPERTS = {**NO_WINDOW, "num_local_experts": 8, "num_experts_per_tok": 2}


def head_dim(size: int) -> dict:
    return {"head_dim": size}


# fmt: off
MODELS = {
    "llama": (
        ("LLaMA 7B, Vicuna 7B v1.3, OpenLLaMA 7B", 32, 4096, 11008, 32, None, 32000, None, {"max_position_embeddings": 2048}),
        ("LLaMA 13B, OpenLLaMA 13B", 40, 5120, 13824, 40, None, 32000, None, {"max_position_embeddings": 2048}),
        ("LLaMA 30B", 60, 6656, 17920, 52, None, 32000, None, {"max_position_embeddings": 2048}),
        ("LLaMA 65B", 80, 8192, 22016, 64, None, 32000, None, {"max_position_embeddings": 2048}),
        ("OpenLLaMA 3B", 26, 3200, 8640, 32, None, 32000, None, {"max_position_embeddings": 2048}),
        ("Sheared-LLaMA 1.3B", 24, 2048, 5504, 16, None, 32000, None, {"max_position_embeddings": 4096}),
        ("Sheared-LLaMA 2.7B", 32, 2560, 6912, 20, None, 32000, None, {"max_position_embeddings": 4096}),
        ("Llama 2 7B, Vicuna 7B v1.5", 32, 4096, 11008, 32, 32, 32000, None, {}),
        ("Llama 2 13B, Vicuna 13B v1.5", 40, 5120, 13824, 40, 40, 32000, None, {}),
        ("Llama 2 70B", 80, 8192, 28672, 64, 8, 32000, None, {}),
        ("LLaMA Pro 8B", 40, 4096, 11008, 32, 32, 32000, None, {}),
        ("Vicuna 7B v1.5 16K", 32, 4096, 11008, 32, 32, 32000, None, {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("CodeLlama 7B", 32, 4096, 11008, 32, 32, 32016, 1e6, {"max_position_embeddings": 16384}),
        ("CodeLlama 7B Python", 32, 4096, 11008, 32, 32, 32000, 1e6, {"max_position_embeddings": 16384}),
        ("CodeLlama 13B", 40, 5120, 13824, 40, 40, 32016, 1e6, {"max_position_embeddings": 16384}),
        ("CodeLlama 34B", 48, 8192, 22016, 64, 8, 32000, 1e6, {"max_position_embeddings": 16384}),
        ("CodeLlama 70B", 80, 8192, 28672, 64, 8, 32016, 1e6, {"max_position_embeddings": 16384}),
        ("TinyLlama 1.1B", 22, 2048, 5632, 32, 4, 32000, None, {"max_position_embeddings": 2048}),
        ("SOLAR 10.7B", 48, 4096, 14336, 32, 8, 32000, 10000.0, {}),
        ("Llama 3 8B", 32, 4096, 14336, 32, 8, 128256, 5e5, {"max_position_embeddings": 8192}),
        ("Llama 3 70B", 80, 8192, 28672, 64, 8, 128256, 5e5, {"max_position_embeddings": 8192}),
        ("Llama 3.1 8B, DeepSeek-R1-Distill-Llama 8B", 32, 4096, 14336, 32, 8, 128256, 5e5, LLAMA_3_1),
        ("Llama 3.1 70B, Llama 3.3 70B, DeepSeek-R1-Distill-Llama 70B", 80, 8192, 28672, 64, 8, 128256, 5e5, LLAMA_3_1),
        ("Llama 3.1 405B", 126, 16384, 53248, 128, 8, 128256, 5e5, LLAMA_3_1),
        ("Llama 3.2 1B", 16, 2048, 8192, 32, 8, 128256, 5e5, {**LLAMA_3_2, **head_dim(64)}),
        ("Llama 3.2 3B", 28, 3072, 8192, 24, 8, 128256, 5e5, {**LLAMA_3_2, **head_dim(128)}),
        ("Falcon3 1B", 18, 2048, 8192, 8, 4, 131072, 1000042, head_dim(256)),
        ("Falcon3 3B", 22, 3072, 9216, 12, 4, 131072, 1000042, head_dim(256)),
        ("Falcon3 7B", 28, 3072, 23040, 12, 4, 131072, 1000042, head_dim(256)),
        ("Falcon3 10B", 40, 3072, 23040, 12, 4, 131072, 1000042, head_dim(256)),
        ("SmolLM 135M", 30, 576, 1536, 9, 3, 49152, 10000.0, TIED),
        ("SmolLM 360M", 32, 960, 2560, 15, 5, 49152, 10000.0, TIED),
        ("SmolLM 1.7B", 24, 2048, 8192, 32, 32, 49152, 10000.0, TIED),
        ("SmolLM2 135M", 30, 576, 1536, 9, 3, 49152, 100000, TIED),
        ("SmolLM2 360M", 32, 960, 2560, 15, 5, 49152, 100000, TIED),
        ("SmolLM2 1.7B", 24, 2048, 8192, 32, 32, 49152, 130000, TIED),
        ("Yi 6B, Yi-1.5 6B", 32, 4096, 11008, 32, 4, 64000, 5e6, {}),
        ("Yi 9B, Yi-1.5 9B", 48, 4096, 11008, 32, 4, 64000, 5e6, {}),
        ("Yi 34B, Yi-1.5 34B", 60, 7168, 20480, 56, 8, 64000, 5e6, {}),
        ("DeepSeek LLM 7B, DeepSeek-Coder 7B v1.5", 30, 4096, 11008, 32, 32, 102400, 10000.0, {}),
        ("DeepSeek LLM 67B", 95, 8192, 22016, 64, 8, 102400, 10000.0, {}),
        ("DeepSeek-Coder 1.3B", 24, 2048, 5504, 16, 16, 32256, 100000, LINEAR_4),
        ("DeepSeek-Coder 6.7B", 32, 4096, 11008, 32, 32, 32256, 100000, LINEAR_4),
        ("DeepSeek-Coder 33B", 62, 7168, 19200, 56, 8, 32256, 100000, LINEAR_4),
        ("Granite Code 3B", 32, 2560, 10240, 32, 32, 49152, 10000, {**BIASES, **TIED}),
        ("Granite Code 8B", 36, 4096, 14336, 32, 8, 49152, 10000, {**BIASES, **TIED}),
        ("Salamandra 2B", 24, 2048, 5440, 16, 16, 256000, 10000.0, {"max_position_embeddings": 8192}),
        ("Salamandra 7B", 32, 4096, 11008, 32, 8, 256000, 10000.0, {"max_position_embeddings": 8192}),
        ("EuroLLM 1.7B", 24, 2048, 5632, 16, 8, 128000, 10000.0, {}),
        ("EuroLLM 9B", 42, 4096, 12288, 32, 8, 128000, 10000.0, {}),
    ),
    "mistral": (
        ("Mistral 7B v0.1, Zephyr 7B", 32, 4096, 14336, 32, 8, 32000, 10000.0, {"sliding_window": 4096}),
        ("Mistral 7B v0.2", 32, 4096, 14336, 32, 8, 32000, 1e6, NO_WINDOW),
        ("Mistral 7B v0.3, Mathstral 7B", 32, 4096, 14336, 32, 8, 32768, 1e6, NO_WINDOW),
        ("Mistral Nemo 12B", 40, 5120, 14336, 32, 8, 131072, 1e6, {**NO_WINDOW, **head_dim(128)}),
        ("Ministral 8B 2410", 36, 4096, 12288, 32, 8, 131072, 1e8, {"sliding_window": 32768, **head_dim(128)}),
        ("Mistral Small 22B 2409, Codestral 22B", 56, 6144, 16384, 48, 8, 32768, 1e6, {**NO_WINDOW, **head_dim(128)}),
        ("Mistral Small 24B 2501", 40, 5120, 32768, 32, 8, 131072, 1e8, {**NO_WINDOW, **head_dim(128)}),
        ("Mistral Large 123B 2407", 88, 12288, 28672, 96, 8, 32768, 1e6, NO_WINDOW),
    ),
    "mixtral": (
        ("Mixtral 8x7B", 32, 4096, 14336, 32, 8, 32000, 1e6, EXPERTS),
        ("Mixtral 8x22B", 56, 6144, 16384, 48, 8, 32768, 1e6, {**EXPERTS, "max_position_embeddings": 65536}),
    ),
    "qwen2": (
        ("Qwen1.5 0.5B", 24, 1024, 2816, 16, 16, 151936, 1e6, TIED),
        ("Qwen1.5 1.8B", 24, 2048, 5504, 16, 16, 151936, 1e6, {}),
        ("Qwen1.5 4B", 40, 2560, 6912, 20, 20, 151936, 5e6, {}),
        ("Qwen1.5 7B", 32, 4096, 11008, 32, 32, 151936, 1e6, {}),
        ("Qwen1.5 14B", 40, 5120, 13696, 40, 40, 152064, 1e6, {}),
        ("Qwen1.5 32B", 64, 5120, 27392, 40, 8, 152064, 1e6, {}),
        ("Qwen1.5 72B", 80, 8192, 24576, 64, 64, 152064, 1e6, {}),
        ("Qwen2 0.5B, Qwen2.5 0.5B", 24, 896, 4864, 14, 2, 151936, 1e6, TIED),
        ("Qwen2 1.5B, Qwen2.5 1.5B", 28, 1536, 8960, 12, 2, 151936, 1e6, TIED),
        ("DeepSeek-R1-Distill-Qwen 1.5B", 28, 1536, 8960, 12, 2, 151936, 10000, {}),
        ("Qwen2.5 3B", 36, 2048, 11008, 16, 2, 151936, 1e6, TIED),
        ("Qwen2 7B, Qwen2.5 7B", 28, 3584, 18944, 28, 4, 152064, 1e6, {}),
        ("Qwen2.5-Math 7B, DeepSeek-R1-Distill-Qwen 7B", 28, 3584, 18944, 28, 4, 152064, 10000, {}),
        ("Qwen2.5 14B, DeepSeek-R1-Distill-Qwen 14B", 48, 5120, 13824, 40, 8, 152064, 1e6, {}),
        ("Qwen2.5 32B, QwQ 32B, DeepSeek-R1-Distill-Qwen 32B", 64, 5120, 27648, 40, 8, 152064, 1e6, {}),
        ("Qwen2 72B, Qwen2.5 72B", 80, 8192, 29568, 64, 8, 152064, 1e6, {}),
    ),
    "qwen3": (
        ("Qwen3 0.6B", 28, 1024, 3072, 16, 8, 151936, 1e6, {**TIED, **head_dim(128)}),
        ("Qwen3 1.7B", 28, 2048, 6144, 16, 8, 151936, 1e6, {**TIED, **head_dim(128)}),
        ("Qwen3 4B", 36, 2560, 9728, 32, 8, 151936, 1e6, {**TIED, **head_dim(128)}),
        ("Qwen3 4B 2507", 36, 2560, 9728, 32, 8, 151936, 5e6, {**TIED, **head_dim(128)}),
        ("Qwen3 8B", 36, 4096, 12288, 32, 8, 151936, 1e6, head_dim(128)),
        ("Qwen3 14B", 40, 5120, 17408, 40, 8, 151936, 1e6, head_dim(128)),
        ("Qwen3 32B", 64, 5120, 25600, 64, 8, 151936, 1e6, head_dim(128)),
    ),
}
