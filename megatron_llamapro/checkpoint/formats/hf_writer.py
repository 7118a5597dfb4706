"""Lays out new Hugging Face checkpoints: the safetensors shards, before any tensor is read, and config.json.

A safetensors header depends only on the shapes. The tensors' bytes follow it in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_llamapro.checkpoint.formats.hf_reader import INDEX_FILE, SINGLE_FILE
from megatron_llamapro.checkpoint.formats.hf_tensors import SAFETENSORS_DTYPES
from megatron_llamapro.checkpoint.tensors.layout import (
    DEFAULT_MAX_SHARD_BYTES,
    StoredTensor,
    TargetFile,
    TargetLayout,
    whole,
)
from megatron_llamapro.checkpoint.tensors.weight_map import Shape, hf_shapes
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.hf_config import ITEMSIZES, MANIFEST_KEY
from megatron_llamapro.families.shape import ModelShape

NamedShape = tuple[str, Shape]


def hf_layout(
    folder: Path, shape: ModelShape, dtype: str, *, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
) -> TargetLayout:
    """Return the layout of `model.safetensors`, or of shards of at most `max_shard_bytes` with an index.

    A larger tensor has a shard of its own.
    """
    shards = _divide(list(hf_shapes(shape).items()), ITEMSIZES[dtype], max_shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    files: list[TargetFile] = []
    tensors: dict[str, tuple[StoredTensor, ...]] = {}
    for name, shard in zip(names, shards, strict=True):
        part = safetensors_layout(folder / name, shard, dtype)
        files += part.files
        tensors.update(part.tensors)
    return TargetLayout(tensors, tuple(files), _index(names, shards, dtype))


def safetensors_layout(path: Path, tensors: Sequence[NamedShape], dtype: str) -> TargetLayout:
    """Return the layout of one safetensors file."""
    header = _header(tensors, dtype)
    position, places = len(header), {}
    for name, size in tensors:
        places[name] = (whole(size, path, position),)
        position += _num_bytes(size, ITEMSIZES[dtype])
    return TargetLayout(places, (TargetFile(path, position, ((0, header),)),), {})


def _index(names: Sequence[str], shards: Sequence[Sequence[NamedShape]], dtype: str) -> dict[str, bytes]:
    if len(shards) == 1:
        return {}
    total = sum(_num_bytes(size, ITEMSIZES[dtype]) for shard in shards for _, size in shard)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_FILE: (json.dumps(index, indent=2) + "\n").encode()}


def _num_bytes(size: Shape, itemsize: int) -> int:
    tensor = StoredTensor(size, ())
    return tensor.num_rows * tensor.num_columns * itemsize


def _divide(tensors: Sequence[NamedShape], itemsize: int, max_shard_bytes: int) -> list[list[NamedShape]]:
    shards: list[list[NamedShape]] = [[]]
    held = 0
    for name, size in tensors:
        num_bytes = _num_bytes(size, itemsize)
        if shards[-1] and held + num_bytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, size))
        held += num_bytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _header(shard: Sequence[NamedShape], dtype: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in shard:
        end = offset + _num_bytes(size, ITEMSIZES[dtype])
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def config_text(config: Mapping, *, dtype: str, manifest: Manifest | None = None) -> bytes:
    """Return config.json. An exported one has the manifest under "llamapro"."""
    content = with_dtype({key: value for key, value in config.items() if key != MANIFEST_KEY}, dtype)
    if manifest is not None:
        content[MANIFEST_KEY] = manifest.to_json()
    return (json.dumps(content, indent=2) + "\n").encode()


def with_dtype(config: Mapping, dtype: str) -> dict:
    """Return `config` with the type of its weights, under the name that it used: "dtype" or the older "torch_dtype"."""
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["dtype"]
    return {**config, **dict.fromkeys(names, dtype)}
