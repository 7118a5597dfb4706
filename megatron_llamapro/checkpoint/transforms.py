"""Between Hugging Face's tensors and megatron.core's: pure, bit-exact rearrangements of rows, and casts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from megatron_llamapro.checkpoint.weight_map import Merge, Weight
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.families import WEIGHT_DTYPES, ModelShape

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_DTYPES}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def merge(weight: Weight, tensors: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """Hugging Face's tensors of one weight → megatron.core's: [rows, columns], [rows], or [experts, rows, columns]."""
    if weight.row.merge is Merge.QKV:
        tensors = [_by_group(tensor, shape.num_query_groups) for tensor in tensors]
        return torch.cat(tensors, dim=1).reshape(weight.megatron_shape)
    whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    return whole.reshape(weight.megatron_shape)


def split(weight: Weight, tensor: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    """megatron.core's tensor → Hugging Face's, in the order of the row; `merge`'s inverse."""
    rows = [size[0] for size in weight.hf_shapes]
    if weight.row.merge is Merge.QKV:
        groups = shape.num_query_groups
        parts = _by_group(tensor, groups).split([count // groups for count in rows], dim=1)
    else:
        parts = tensor.reshape(sum(rows), *weight.hf_shapes[0][1:]).split(rows)
    return [part.reshape(size) for part, size in zip(parts, weight.hf_shapes, strict=True)]


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, …] → [groups, rows a group, …]"""
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def cast(tensor: torch.Tensor, dtype: torch.dtype, *, name: str) -> torch.Tensor:
    """`tensor` in `dtype`.

    Raises:
        CheckpointError: a finite value becomes infinite (bfloat16 7e4 has no float16).
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.isfinite(result).logical_not().sum() > torch.isfinite(tensor).logical_not().sum():
        raise CheckpointError(
            f"{name} has values that {DTYPE_NAMES[dtype]} cannot hold (they become infinite): keep the source's type, "
            "or choose bfloat16 or float32"
        )
    return result


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major, without a copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256(tensor: torch.Tensor) -> str:
    """Content hash of a tensor: of its bytes, not of its shape or type."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one type hold the same bits: tells -0.0 from 0.0, and knows a NaN again."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
