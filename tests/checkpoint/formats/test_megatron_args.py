"""A config.json may fit the tensors of a Megatron-LM checkpoint but contradict the arguments it was saved with."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy, megatron_to_hf
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.runtime.upstream import import_megatron

Tiny = Callable[..., Path]

# Fields of config.json that no tensor shape depends on, and the argument that contradicts each.
COPIED = {
    "heads": (
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        "num_attention_heads 4, but its config.json gives 2",
    ),
    "rotary base": (
        {"rope_theta": 1e6, "rope_parameters": None},
        "rotary_base 500000, but its config.json gives 1000000",
    ),
    "epsilon": ({"rms_norm_eps": 1e-5}, "norm_epsilon 1e-06, but its config.json gives 1e-05"),
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.fixture(params=["legacy", "torch_dist"])
def foreign(request: pytest.FixtureRequest, tiny_llama: Tiny, tmp_path: Path) -> Path:
    """Return a checkpoint with Megatron-LM's arguments and no manifest."""
    hf_to_megatron(tiny_llama(**ROPE), tmp_path / "legacy", kind=legacy())
    if request.param == "torch_dist":
        hf_to_megatron(tiny_llama(**ROPE), tmp_path / "torch_dist")
        save_args(tmp_path / "torch_dist", saved_args(tmp_path / "legacy"))
    (tmp_path / request.param / "llamapro.json").unlink()
    return tmp_path / request.param


def saved_args(folder: Path) -> argparse.Namespace:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "release/mp_rank_00/model_optim_rng.pt", weights_only=True)["args"]


def save_args(folder: Path, args: argparse.Namespace) -> None:
    """Write the arguments where a torch_dist checkpoint of Megatron-LM keeps them."""
    common = torch.load(folder / "common.pt", weights_only=True)
    torch.save({**common, "args": args}, folder / "common.pt")


def set_fields(folder: Path, fields: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(("fields", "message"), COPIED.values(), ids=COPIED.keys())
def test_saved_arguments_that_contradict_config_json_are_refused(
    fields: dict, message: str, foreign: Path, tmp_path: Path
) -> None:
    megatron_to_hf(foreign, tmp_path / "right")
    set_fields(foreign, fields)
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(foreign, tmp_path / "wrong")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "wrong").exists()


def test_a_fractional_rotary_base_is_kept(tiny_llama: Tiny, tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}
    hf_to_megatron(tiny_llama(**rope), tmp_path / "it", kind=legacy())
    assert saved_args(tmp_path / "it").rotary_base == 10000.5


APPLIED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **APPLIED}
PLAIN, LINEAR = {"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}
MISTRAL = {"model_type": "mistral", "sliding_window": 16}
QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}

# Saved arguments → fields of the config.json beside them, and the error; None if both describe the same function.
SAVED = {
    "llama3": ({"use_rope_scaling": True, "rope_scaling_factor": 8.0}, LLAMA3, None),
    "llama3 of old": ({"use_rope_scaling": True}, LLAMA3, None),
    "defaults": ({"use_rope_scaling": False, "rope_scaling_factor": 8.0}, PLAIN, None),
    "llama3 unsaid": (
        {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
        PLAIN,
        "use_rope_scaling True, but its config.json gives False",
    ),
    "factor": (
        {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
        {**LLAMA3, "factor": 32.0},
        "rope_scaling_factor 8, but its config.json gives 32",
    ),
    "low frequencies": ({"use_rope_scaling": True}, {**LLAMA3, "low_freq_factor": 2.0}, "low_freq_factor 1, but its"),
    "original length": (
        {"use_rope_scaling": True},
        {**LLAMA3, "original_max_position_embeddings": 4096},
        "original_max_position_embeddings 8192, but its config.json gives 4096",
    ),
    "linear": ({"rotary_seq_len_interpolation_factor": 4}, LINEAR, None),
    "linear unsaid": (
        {"rotary_seq_len_interpolation_factor": 4},
        PLAIN,
        "rotary_seq_len_interpolation_factor 4, but its config.json gives 1",
    ),
    "by one": ({"rotary_seq_len_interpolation_factor": 1}, PLAIN, None),
    "two kinds": ({"use_rope_scaling": True}, LINEAR, "use_rope_scaling True, but its config.json gives False"),
}
ALWAYS = {
    "apply_layernorm_1p": (False, True),
    "layernorm_zero_centered_gamma": (False, True),
    "rotary_percent": (1.0, 0.5),
    "rotary_interleaved": (False, True),
    "position_embedding_type": ("learned_absolute", "none"),
    "no_rope_freq": (None, 4),
    "normalization": ("LayerNorm", "other"),
    "apply_residual_connection_post_layernorm": (False, True),
    "qk_l2_norm": (False, True),
    "quick_geglu": (False, True),
    "softmax_type": ("vanilla", "off-by-one"),
}
ROUTER = {"moe_router_pre_softmax": True, "moe_router_score_function": "sigmoid"}
WINDOWS = {
    "all": ({"window_size": (15, 0)}, MISTRAL, None),
    "a list": ({"window_size": [15, 0], "window_attn_skip_freq": [1, 1, 1, 1]}, MISTRAL, None),
    "without end": ({"window_size": (-1, -1)}, {}, None),
    "of no layer": ({"window_size": (15, 0), "window_attn_skip_freq": 1}, {}, None),
    "where there are none": (
        {"window_size": (4095, 0)},
        {},
        r"window_size \(4095, 0\), but its config.json gives None",
    ),
    "another": ({"window_size": (31, 0)}, MISTRAL, r"window_size \(31, 0\), but its config.json gives \(15, 0\)"),
    "some": ({"window_size": (15, 0), "window_attn_skip_freq": [0, 0, 1, 1]}, QWEN, None),
    "others": (
        {"window_size": (15, 0), "window_attn_skip_freq": 2},
        QWEN,
        r"window_attn_skip_freq \(1, 0, 1, 0\), but its config.json gives \(0, 0, 1, 1\)",
    ),
}
MADE = {
    "a router of a dense model": (ROUTER, {}, None),
    **{
        name: ({name: value}, {"model_type": "mixtral"}, f"was saved with {name} {value}, which is not supported")
        for name, value in ROUTER.items()
    },
    **{
        f"rope: {name}": (saved, {"rope_parameters": {"rope_theta": 5e5, **rope}}, message)
        for name, (saved, rope, message) in SAVED.items()
    },
    **{f"windows: {name}": row for name, row in WINDOWS.items()},
    **{f"{name} unset": ({name: default}, {}, None) for name, (default, _) in ALWAYS.items()},
    **{
        name: ({name: value}, {}, f"was saved with {name} {value}, which is not supported")
        for name, (_, value) in ALWAYS.items()
    },
}


@pytest.mark.parametrize(("saved", "fields", "message"), MADE.values(), ids=MADE.keys())
def test_arguments_that_no_tensor_shows_are_compared(
    saved: dict, fields: dict, message: str | None, tiny_llama: Tiny, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    hf_to_megatron(tiny_llama(**fields), foreign)
    (foreign / "llamapro.json").unlink()
    save_args(foreign, argparse.Namespace(**saved))
    if message is None:
        megatron_to_hf(foreign, tmp_path / "it")
        return
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(foreign, tmp_path / "it")
    assert "\n" not in str(refusal.value)


def test_megatron_core_still_applies_the_assumed_rope_constants() -> None:
    import_megatron()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parameters = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    assert {name: parameters[name].default for name in parameters if name not in ("self", "freqs", "factor")} == APPLIED
