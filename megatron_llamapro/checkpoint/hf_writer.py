"""Hugging Face checkpoints, written one tensor at a time: safetensors shards, their index, config.json.

A safetensors header is known from the shapes before any tensor is; so each shard is its header, then the tensors'
bytes as they come. (The library's own writer needs a whole shard in memory.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_llamapro.checkpoint.hf_reader import INDEX_FILE, SINGLE_FILE, shapes_in_bytes
from megatron_llamapro.checkpoint.manifest import Manifest
from megatron_llamapro.checkpoint.transforms import DTYPES, raw_bytes
from megatron_llamapro.checkpoint.weight_map import Shape
from megatron_llamapro.model.families import CONFIG_NAME, MANIFEST_KEY

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9

_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class NamedShape:
    """A tensor to come."""

    name: str
    shape: Shape


def write_weights(
    folder: Path,
    tensors: Iterable[torch.Tensor],
    *,
    names: Sequence[NamedShape],
    dtype: str,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write `tensors`, which come in the order of `names`, as model.safetensors, or as shards with an index.

    Holds one tensor at a time. A tensor larger than `max_shard_bytes` gets a shard of its own.
    """
    shards = _divide(names, dtype, max_shard_bytes)
    files = [SINGLE_FILE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    stream = iter(tensors)
    for file_name, shard in zip(files, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            _write_header(file, shard, dtype)
            for expected in shard:
                tensor = next(stream)
                assert tuple(tensor.shape) == expected.shape and tensor.dtype == DTYPES[dtype], expected
                file.write(raw_bytes(tensor))
    if len(shards) > 1:
        total = sum(shapes_in_bytes(item.shape, DTYPES[dtype]) for item in names)
        weight_map = {item.name: file for file, shard in zip(files, shards, strict=True) for item in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(folder: Path, config: Mapping, manifest: Manifest) -> None:
    """Write config.json with the manifest under "llamapro", and llamapro.json beside it."""
    content = {**with_dtype(config, manifest.dtype), MANIFEST_KEY: manifest.to_json()}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    manifest.write(folder)


def with_dtype(config: Mapping, dtype: str) -> dict:
    """`config` with the type of its weights, under the name it used: "dtype", or the older "torch_dtype"."""
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["dtype"]
    return {**config, **dict.fromkeys(names, dtype)}


def _divide(names: Sequence[NamedShape], dtype: str, max_shard_bytes: int) -> list[list[NamedShape]]:
    shards: list[list[NamedShape]] = [[]]
    held = 0
    for item in names:
        size = shapes_in_bytes(item.shape, DTYPES[dtype])
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += size
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_header(file: BinaryIO, shard: Sequence[NamedShape], dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        end = offset + shapes_in_bytes(item.shape, DTYPES[dtype])
        header[item.name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
