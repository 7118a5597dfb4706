"""What a Megatron-LM checkpoint says of its model in its saved arguments, held against config.json.

Its tensors do not say how rows of QKV are divided into heads, nor the base of the rotary embeddings: a config.json that
was copied from another model of the same sizes would fit, and be another function.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_llamapro.checkpoint.pickles import Record
from megatron_llamapro.checkpoint.torch_archive import TORCH_GLOBALS, DamagedArchiveError, read_archive
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside
from megatron_llamapro.model.shape import ModelShape


class _MegatronGlobals:
    """What the pickles of Megatron-LM's own checkpoints name besides tensors. Nothing of it is imported or called."""

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
# may leave them in the arguments though the model has others: they count as not said.
_DEFAULTS = {
    "kv_channels": None,
    "rotary_base": 10000,
    "norm_epsilon": 1e-5,
    "moe_router_topk": 2,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
}


def check_common_state(folder: Path, name: str, shape: ModelShape) -> None:
    """Hold the arguments in a torch_dist checkpoint's common state against the model, where it has any.

    Raises:
        CheckpointError: they contradict it.
    """
    path = file_inside(folder, name)
    if path is None:
        return
    try:
        with path.open("rb") as file:
            state = read_archive(file, admitted=MEGATRON_GLOBALS)
    except DamagedArchiveError:  # a conversion needs nothing of it
        return
    if isinstance(state, dict):
        check_args(state.get("args"), shape, where=folder)


def check_args(args: object, shape: ModelShape, *, where: Path) -> None:
    """Hold a checkpoint's arguments against the model that its config.json describes.

    Raises:
        CheckpointError: they contradict one another.
    """
    said = args.state if isinstance(args, Record) and isinstance(args.state, dict) else {}
    for name, expected in _expected(shape, said):
        value = said.get(name)
        is_said = value is not None and value != _DEFAULTS.get(name)
        if is_said and value != expected:
            raise CheckpointError(
                f"{where} was saved with {name} {str(value)[:50]}, its config.json makes that {_text(expected)}: copy "
                "the config.json of its own model"
            )


def _text(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _expected(shape: ModelShape, said: dict) -> Iterator[tuple[str, object]]:
    yield "num_attention_heads", shape.num_attention_heads
    if said.get("group_query_attention") is True:
        yield "num_query_groups", shape.num_query_groups
    yield "kv_channels", shape.kv_channels
    yield "rotary_base", shape.rotary_base
    yield "rotary_percent", 1.0
    yield "rotary_interleaved", False
    yield "position_embedding_type", "rope"
    yield "norm_epsilon", shape.layernorm_epsilon
    yield "normalization", "RMSNorm"
    if shape.is_moe:
        yield "moe_router_topk", shape.moe_router_topk
