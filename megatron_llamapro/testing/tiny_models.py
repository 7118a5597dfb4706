"""Tiny models: shapes for tests that need no weights, and random Hugging Face checkpoints of every family.

A checkpoint has a tokenizer. A seed always gives the same checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_llamapro.families.shape import ModelShape

VOCABULARY = 131  # a prime, so that the vocabulary always needs padding

_WINDOW = {"use_sliding_window": True, "sliding_window": 8}  # shorter than any sequence of the tests
_ALTERNATING = ["full_attention", "sliding_attention"] * 2

# Settings of `make_tiny_model`: one row per family or variant of it. Every test of families uses all rows.
TINY_FAMILIES: dict[str, dict] = {
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied, window from layer 2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "max_window_layers": 2,
        **_WINDOW,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 0.05},  # large enough to matter
    "qwen3, alternating windows": {"model_type": "qwen3", "head_dim": 8, "layer_types": _ALTERNATING, **_WINDOW},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_shape(**fields: Any) -> ModelShape:
    """Two dense blocks with two query groups of two heads, untied; `fields` are what a test has otherwise."""
    return ModelShape(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "vocab_size": VOCABULARY,
            "layernorm_epsilon": 1e-5,
            "max_position_embeddings": 64,
            "rotary_base": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            **fields,
        }
    )


def make_tiny_model(
    folder: Path,
    *,
    model_type: str = "llama",
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    vocab_size: int = VOCABULARY,
    tie_word_embeddings: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "5GB",
    with_tokenizer: bool = True,
    **config: object,
) -> Path:
    """Write the checkpoint and return its folder. `config` holds further fields of transformers' configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            model_type,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            vocab_size=vocab_size,
            tie_word_embeddings=tie_word_embeddings,
            **{
                "max_position_embeddings": 128,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": None,
                **config,
            },
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    disable_progress_bar()  # a test may check the output
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if with_tokenizer:
        write_tiny_tokenizer(Path(folder), vocab_size=min(vocab_size, VOCABULARY))
    return Path(folder)


def write_tiny_tokenizer(folder: Path, *, vocab_size: int = VOCABULARY) -> None:
    """Write tokenizer.json, with one character per token, and tokenizer_config.json. Id 2 ends a document."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)]
    special = ["<unk>", "<s>", "</s>"]
    words = (special + characters + [f"<unused{i}>" for i in range(vocab_size)])[:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
