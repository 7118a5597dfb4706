"""Checks config.json against the arguments that a Megatron-LM checkpoint saved.

Its tensors do not show how QKV rows are divided into heads, or the base of the rotary embeddings. A config.json from
another model of the same sizes would fit the tensors but give another function.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from megatron_llamapro.checkpoint.formats.pickles import Record
from megatron_llamapro.checkpoint.formats.torch_archive import TORCH_GLOBALS, DamagedArchiveError, read_archive
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.shape import ModelShape, RopeScaling


class _MegatronGlobals:
    """The names in pickles of Megatron-LM's own checkpoints. Nothing is imported or called."""

    _NAMES = frozenset(
        {
            *TORCH_GLOBALS,
            "argparse.Namespace",
            "types.SimpleNamespace",
            "_io.BytesIO",
            "_codecs.encode",
            "signal.Signals",
            "numpy.ndarray",
            "numpy.dtype",
            "numpy.core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "torch.device",
            *(f"torch.{name}" for name in ("float32", "float16", "bfloat16", "int64", "uint8")),
        }
    )

    def __contains__(self, path: object) -> bool:
        return path in self._NAMES or (isinstance(path, str) and path.startswith("megatron."))


MEGATRON_GLOBALS = _MegatronGlobals()

# Megatron-LM's defaults (megatron/training/arguments.py, core_v0.16.1). A tool that makes a checkpoint without training
# may leave them in the arguments even if the model has other values, so they count as not given.
_DEFAULTS = {
    "kv_channels": None,
    "rotary_base": 10000,
    "norm_epsilon": 1e-5,
    "moe_router_topk": 2,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "use_rope_scaling": False,
}

# Values that every supported model has, whatever its config.json says. No tensor shows them.
_ALWAYS = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "position_embedding_type": "rope",
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,  # norms scale by 1 + weight; megatron.core calls it by the next name
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_l2_norm": False,
    "quick_geglu": False,
    "softmax_type": "vanilla",
}
_ALWAYS_WITH_EXPERTS = {"moe_router_pre_softmax": False, "moe_router_score_function": "softmax"}

# Megatron-LM has no arguments for these: see `RotaryEmbedding._apply_scaling` of megatron.core.
_ROPE_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def check_common_state(content: bytes, shape: ModelShape, *, where: Path) -> None:
    """Check the arguments in a torch_dist checkpoint's common state, if it has any, against the model.

    Raises:
        CheckpointError: they contradict the model.
    """
    try:
        state = read_archive(io.BytesIO(content), admitted=MEGATRON_GLOBALS)
    except DamagedArchiveError:  # a conversion does not need the common state
        return
    if isinstance(state, dict):
        check_args(state.get("args"), shape, where=where)


def check_args(args: object, shape: ModelShape, *, where: Path) -> None:
    """Check a checkpoint's arguments against the model that its config.json describes.

    Raises:
        CheckpointError: they contradict each other, or an argument has a value that no supported model has.
    """
    said = _said(args, shape.num_layers)
    for name, expected in (_ALWAYS | _ALWAYS_WITH_EXPERTS if shape.is_moe else _ALWAYS).items():
        if name in said and said[name] != expected:
            raise CheckpointError(
                f"{where} was saved with {name} {_text(said[name])}, which is not supported: only {expected} is"
            )
    for name, expected in _expected(shape, said):
        if name in said and said[name] != expected:
            raise CheckpointError(
                f"{where} was saved with {name} {_text(said[name])}, but its config.json gives {_text(expected)}: "
                "copy the config.json of its own model"
            )


def _said(args: object, num_layers: int) -> dict:
    """Return the arguments that count as given, with windows in the form of `ModelShape`."""
    saved = args.state if isinstance(args, Record) and isinstance(args.state, dict) else {}
    said = {name: value for name, value in saved.items() if value is not None and value != _DEFAULTS.get(name)}
    if said.get("use_rope_scaling") is True:
        said |= _ROPE_SCALING
    window, skipped = said.pop("window_size", None), said.pop("window_attn_skip_freq", None)
    flags = _window_flags(skipped, num_layers)
    if isinstance(window, (tuple, list)) and -1 not in window[:1] and any(flags):  # -1: no end
        said |= {"window_size": tuple(window), "window_attn_skip_freq": flags}
    return said


def _window_flags(skipped: object, num_layers: int) -> tuple[int, ...]:
    """Return 1 or 0 per layer: whether it has the window, as megatron.core's `is_layer_window_attention` decides."""
    if isinstance(skipped, list):
        return tuple(int(bool(flag)) for flag in skipped)
    if isinstance(skipped, int) and skipped != 0:
        return tuple(int(layer % skipped != 0) for layer in range(1, num_layers + 1))
    return (1,) * num_layers


def _text(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)[:50]


def _expected(shape: ModelShape, said: dict) -> Iterator[tuple[str, object]]:
    """Yield the arguments that depend on config.json, with the values that it gives them."""
    yield "num_attention_heads", shape.num_attention_heads
    if said.get("group_query_attention") is True:
        yield "num_query_groups", shape.num_query_groups
    yield "kv_channels", shape.kv_channels
    yield "rotary_base", shape.rotary_base
    yield "norm_epsilon", shape.layernorm_epsilon
    yield "window_size", shape.window_size
    yield "window_attn_skip_freq", tuple(int(shape.window_of(layer) is not None) for layer in range(shape.num_layers))
    if shape.is_moe:
        yield "moe_router_topk", shape.moe_router_topk
    yield from _expected_rope_scaling(shape.rope_scaling, said)


def _expected_rope_scaling(scaling: RopeScaling | None, said: dict) -> Iterator[tuple[str, object]]:
    rope_type, factor = (scaling.rope_type, scaling.factor) if scaling else (None, 1)
    yield "rotary_seq_len_interpolation_factor", factor if rope_type == "linear" else 1
    yield "use_rope_scaling", rope_type == "llama3"
    if "use_rope_scaling" in said:
        yield "rope_scaling_factor", factor
        for name in _ROPE_SCALING:
            yield name, getattr(scaling, name, None)
