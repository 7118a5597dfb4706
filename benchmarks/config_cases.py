"""Configurations that vary every field that is read, with the spellings and the nonsense found in files."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ABSENT = "(absent)"

Choose = Callable[[Sequence], Any]
"""Returns one of some values, for example `random.Random(0).choice`."""

_LAYERS = 3

BASE = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 61,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

ROPE_FIELDS: dict[str, list] = {
    "rope_theta": [ABSENT, 10000.0, 500000, None],
    "rope_scaling": [
        ABSENT,
        None,
        {},
        {"type": "linear", "factor": 4},
        {**_LINEAR, "type": "llama3"},
        {**_LINEAR, "rope_theta": 500000},
        {"rope_type": "default"},
        {"rope_theta": 500000},
        {"factor": 4.0},
        {"rope_type": None, "factor": 4.0},
        _LLAMA3,
        {key: value for key, value in _LLAMA3.items() if key != "original_max_position_embeddings"},
        _YARN,
    ],
    "rope_parameters": [
        ABSENT,
        None,
        {},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "default"},
        {**_LINEAR, "rope_theta": None},
        {**_LINEAR, "rope_theta": 500000.0},
        {**_LINEAR, "partial_rotary_factor": 0.5},
        {**_LLAMA3, "rope_theta": 10000.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 500000.0}},
        _YARN,
    ],
    "original_max_position_embeddings": [ABSENT, 16, 8, None],
}
"""Values of every field of rotary embeddings. The first is the usual one."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOWS: dict[str, list] = {
    "sliding_window": [ABSENT, 4, None, 0],
    "use_sliding_window": [ABSENT, True, False, None],
    "max_window_layers": [ABSENT, 1, 0, 9, None],
    "layer_types": [
        ABSENT,
        None,
        [_FULL] * _LAYERS,
        [_SLIDING] * _LAYERS,
        [_FULL, _SLIDING, _FULL],
        [_FULL],
        ["attention"] * _LAYERS,
    ],
}
_OTHERS: dict[str, list] = {
    "hidden_size": [32, 40, None],
    "num_attention_heads": [4, 2, 3, ABSENT],
    "num_key_value_heads": [2, 4, 1, 3, None, ABSENT],
    "head_dim": [ABSENT, 16, 8, 7, None],
    "rms_norm_eps": [1e-5, 0.1, 1, None, ABSENT],
    "tie_word_embeddings": [False, True, None, ABSENT],
    "attention_bias": [ABSENT, True, False, None],
    "mlp_bias": [ABSENT, True, False, None],
    "num_local_experts": [ABSENT, 4, None],
    "num_experts": [ABSENT, 4, 8],
    "num_experts_per_tok": [ABSENT, 3, 1, 9, None],
    "router_jitter_noise": [ABSENT, 0.0, 0.1],
    "hidden_act": ["silu", "gelu", "swish", None, ABSENT],
    "attention_dropout": [ABSENT, 0, 0.1, None],
    "partial_rotary_factor": [ABSENT, 1.0, 0.5, None],
    "is_causal": [ABSENT, True, False],
    "per_layer_config": [ABSENT, None, {"1": {"intermediate_size": 8}}],
    "attention_chunk_size": [ABSENT, 4],
    "max_position_embeddings": [64, 8, ABSENT],
    "pretraining_tp": [ABSENT, 2],
    "dtype": [ABSENT, "float32", "bfloat16"],
    "torch_dtype": [ABSENT, "float32", None],
    "vocab_size": [61, ABSENT],
}
FIELDS = {**ROPE_FIELDS, **_WINDOWS, **_OTHERS}

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


def drawn_config(choose: Choose) -> dict:
    """Return a small model of any family in which up to six fields do not have their usual value."""
    changed = {choose(list(FIELDS)) for _ in range(choose(range(7)))}
    if changed & _WINDOWS.keys():  # one of them alone has little effect
        changed |= {"sliding_window", "use_sliding_window"}
    return _config(choose(FAMILIES), {name: choose(FIELDS[name][1:]) for name in sorted(changed)})


def rope_configs(family: str) -> Iterator[dict]:
    """Yield every combination of `ROPE_FIELDS`."""
    for values in itertools.product(*ROPE_FIELDS.values()):
        yield _config(family, dict(zip(ROPE_FIELDS, values, strict=True)))


def _config(family: str, fields: dict) -> dict:
    config = copy.deepcopy({"model_type": family, **BASE, **fields})
    return {name: value for name, value in config.items() if not (isinstance(value, str) and value == ABSENT)}
