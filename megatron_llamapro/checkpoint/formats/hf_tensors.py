"""Renames the tensors of a Hugging Face checkpoint to the weight map's names, and checks them against its config.json.

The other forms of names that transformers reads are accepted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_llamapro.checkpoint.formats.hf_foreign import quantised, what_they_are
from megatron_llamapro.checkpoint.tensors.layout import whole
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, stored_hash
from megatron_llamapro.checkpoint.tensors.weight_map import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_LAYER,
    Shape,
    hf_shapes,
    is_known_extra,
)
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_DTYPES.items()}

_HEAD, _EMBEDDING, _NORM = (row.hugging_face[0][0] for row in (OUTPUT_LAYER, EMBEDDING, FINAL_NORM))
_MODEL = "model."


class HeaderEntry(NamedTuple):
    """Where a tensor is stored."""

    dtype: str
    """safetensors' name of the type."""
    shape: Shape
    path: Path
    offset: int
    """Offset of its bytes in the file."""


def named(entries: Mapping[str, HeaderEntry], shape: ModelShape) -> dict[str, HeaderEntry]:
    """Return the same tensors under the weight map's names. Like transformers, accept that:

    1. `model.` is missing before all names except the head's, or occurs twice.
    2. A Mixtral's experts are stacked (`save_original_format=False`).
    3. Embeddings are tied, and only the head is stored.
    """
    found = _split_experts(_with_one_prefix(entries), shape)
    if shape.tie_word_embeddings and _EMBEDDING not in found and _HEAD in found:
        found[_EMBEDDING] = found.pop(_HEAD)
    return found


def _with_one_prefix(entries: Mapping[str, HeaderEntry]) -> dict[str, HeaderEntry]:
    renamed = {**entries}
    if _NORM in entries:
        return renamed
    if _MODEL + _NORM in entries:
        renamed = {name.removeprefix(_MODEL): entry for name, entry in entries.items()}
    elif _NORM.removeprefix(_MODEL) in entries:
        renamed = {name if name == _HEAD else _MODEL + name: entry for name, entry in entries.items()}
    return renamed if len(renamed) == len(entries) else {**entries}  # else two names would become one


def _split_experts(entries: Mapping[str, HeaderEntry], shape: ModelShape) -> dict[str, HeaderEntry]:
    """Return the tensors with each layer's stacked experts split into one tensor per expert.

    `mlp.experts.gate_up_proj` [experts, 2 · feed-forward, hidden] holds w1, then w3, expert by expert.
    `mlp.experts.down_proj` [experts, hidden, feed-forward] holds every w2. A tensor of another shape is not split.
    """
    found = {**entries}
    experts, inner, hidden = shape.num_moe_experts or 0, shape.ffn_hidden_size, shape.hidden_size
    for layer in range(shape.num_layers if shape.is_moe else 0):
        theirs, ours = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        _rename(found, f"{theirs}gate.weight", f"{ours}gate.weight")
        names = [f"{ours}experts.{expert}.{{}}.weight" for expert in range(experts)]
        gate_up = [name.format(part) for name in names for part in ("w1", "w3")]
        _split(found, f"{theirs}experts.gate_up_proj", (experts, 2 * inner, hidden), gate_up, (inner, hidden))
        down = [name.format("w2") for name in names]
        _split(found, f"{theirs}experts.down_proj", (experts, hidden, inner), down, (hidden, inner))
    return found


def _rename(entries: dict[str, HeaderEntry], name: str, wanted: str) -> None:
    if name in entries and wanted not in entries:
        entries[wanted] = entries.pop(name)


def _split(entries: dict[str, HeaderEntry], name: str, whole: Shape, parts: list[str], part: Shape) -> None:
    """Replace a tensor of shape `whole` by its consecutive parts of shape `part`."""
    held = entries.get(name)
    if held is None or held.shape != whole or held.dtype not in _DTYPES or entries.keys() & {*parts}:
        return
    num_bytes = math.prod(part) * ITEMSIZES[_DTYPES[held.dtype]]
    del entries[name]
    for index, each in enumerate(parts):
        entries[each] = HeaderEntry(held.dtype, part, held.path, held.offset + index * num_bytes)


class Types(NamedTuple):
    """The types that the weights are stored in."""

    most: str
    """The type of most numbers, e.g. bfloat16."""
    others: dict[str, str]
    """The types of the tensors that are stored in another one, by name."""


def are_same(one: HeaderEntry, other: HeaderEntry) -> bool:
    """Return whether two tensors of a supported type are equal bit for bit. Reads both."""
    dtype = _DTYPES.get(one.dtype)
    if dtype is None or one[:2] != other[:2]:  # type and shape
        return False
    size = (math.prod(one.shape),)
    with SourceFiles() as files:
        ours, theirs = (
            stored_hash(whole(size, each.path, each.offset), files, ITEMSIZES[dtype]) for each in (one, other)
        )
    return ours == theirs


def check_tensors(folder: Path, entries: Mapping[str, HeaderEntry], shape: ModelShape, config: Mapping) -> Types:
    """Check names, shapes and types. Return the types.

    Raises:
        CheckpointError: a tensor is missing, unknown, of the wrong shape or of an unsupported type, or the weights are
            quantised.
    """
    said = quantised(config)
    try:
        types = _check(folder, entries, shape)
    except CheckpointError:
        if said is None:
            raise
        raise CheckpointError(f"{folder}: {said}") from None
    if said is not None:
        raise CheckpointError(
            f"{folder}: config.json says that the weights are quantised, but they are plain {types.most}: remove "
            "quantization_config (or quantization) from it, because other software would obey it"
        )
    return types


def _check(folder: Path, entries: Mapping[str, HeaderEntry], shape: ModelShape) -> Types:
    expected = hf_shapes(shape)
    missing = [name for name in expected if name not in entries]
    unknown = [name for name in entries if name not in expected and not is_known_extra(name, shape)]
    why = what_they_are(unknown, missing)
    if why is not None:
        raise CheckpointError(f"{folder}: {why}")
    if missing:
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}{_and_more(missing)}")
    if unknown:
        raise CheckpointError(
            f"{folder} has the tensor {unknown[0][:200]}{_and_more(unknown)}, which this model family does not "
            "have and a conversion would lose"
        )
    sizes: Counter[str] = Counter()
    for name, size in expected.items():
        entry = entries[name]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder}: {name} is stored as {entry.dtype}: only {', '.join(_DTYPES)} are supported, so save "
                "the model in one of them (quantised weights: use the model that they were made from)"
            )
        if entry.shape != size:
            raise CheckpointError(f"{folder}: {name} has shape {entry.shape}, but config.json makes it {size}")
        sizes[_DTYPES[entry.dtype]] += math.prod(size)
    [(most, _)] = sizes.most_common(1)
    dtypes = {name: _DTYPES[entries[name].dtype] for name in expected}
    return Types(most, {name: dtype for name, dtype in dtypes.items() if dtype != most})


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
