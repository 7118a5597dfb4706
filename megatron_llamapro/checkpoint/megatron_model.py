"""What both Megatron formats have in common: megatron.core's tensors, held against the model and seen as Hugging
Face's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.layout import Piece, StoredTensor, is_whole, parts_of
from megatron_llamapro.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_llamapro.checkpoint.opened import Checkpoint, Format
from megatron_llamapro.checkpoint.streaming import FileState
from megatron_llamapro.checkpoint.weight_map import VOCABULARY_ROWS, Shape, Weight, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.model.families import ITEMSIZES, HfModel


@dataclass(frozen=True)
class MegatronTensor:
    """A whole tensor of megatron.core's, as it is stored (a vocabulary may be padded)."""

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]
    """Of the tensor as a matrix: all dimensions but the last are rows."""


def matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor whose leading dimensions are flattened; a vector's elements are rows."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def open_megatron(
    folder: Path,
    format: Format,
    model: HfModel,
    tensors: Mapping[str, MegatronTensor],
    *,
    states: Mapping[Path, FileState],
) -> Checkpoint:
    """A Megatron checkpoint out of its weights; the manifest of one of ours lies beside them. `states` are those of
    their files before it was looked where in them the tensors begin.

    Raises:
        CheckpointError: a tensor that is missing, unknown, of the wrong shape or type, or not whole; a manifest that
            does not fit.
    """
    shape, manifest = model.shape, None
    if (Path(folder) / MANIFEST_NAME).exists():
        manifest = Manifest.read(folder)
        manifest.check_fits(shape, where=folder)
    dtype = _dtype(folder, tensors, manifest)
    if manifest is not None:
        manifest = manifest.stored_as(dtype)
    found: dict[str, StoredTensor] = {}
    weights = weights_of(shape)
    for weight in weights:
        tensor = next((tensors[name] for name in weight.megatron_names if name in tensors), None)
        if tensor is None:
            raise CheckpointError(f"{folder} lacks the tensor {weight.megatron_name}")
        _check(folder, weight, tensor, dtype)
        parts = parts_of(weight, tensor.pieces, shape=shape, itemsize=ITEMSIZES[dtype])
        _check_whole(folder, weight.megatron_name, parts.values())
        found.update(parts)
    unknown = sorted(tensors.keys() - {name for weight in weights for name in weight.megatron_names})
    if unknown:
        raise CheckpointError(f"{folder} has the tensor {unknown[0][:200]}, which this model family does not have")
    used = {piece.file: states[piece.file] for tensor in found.values() for piece in tensor.pieces}
    return Checkpoint(folder, format, model.config, shape, manifest, dtype, found, used)


def _dtype(folder: Path, tensors: Mapping[str, MegatronTensor], manifest: Manifest | None) -> str:
    """What weights must be: what the manifest says, or what they all are, where other software wrote them since."""
    if manifest is not None and any(tensor.dtype == manifest.dtype for tensor in tensors.values()):
        return manifest.dtype
    found = sorted({tensor.dtype for tensor in tensors.values()})
    if len(found) > 1:
        raise CheckpointError(f"{folder} mixes weights of type {' and '.join(found)}: save it in one type")
    if not found or found[0] not in ITEMSIZES:
        known = ", ".join(ITEMSIZES)
        raise CheckpointError(f"{folder} holds weights of type {', '.join(found)}: it must be one of {known}")
    return found[0]


def _check(folder: Path, weight: Weight, tensor: MegatronTensor, dtype: str) -> None:
    name, wanted = weight.megatron_name, weight.megatron_shape
    padded = weight.row.megatron in VOCABULARY_ROWS and tensor.shape[1:] == wanted[1:] and tensor.shape >= wanted
    if tensor.shape != wanted and not padded:
        raise CheckpointError(f"{folder}: {name} has shape {tensor.shape}, config.json makes it {wanted}")
    if tensor.dtype != dtype:
        raise CheckpointError(f"{folder}: {name} is {tensor.dtype}, not {dtype} as its manifest or its other weights")


def _check_whole(folder: Path, name: str, parts: Iterable[StoredTensor]) -> None:
    for part in parts:
        if not is_whole(part):
            raise CheckpointError(f"{folder}: the pieces of {name} overlap or leave a gap: it is damaged")
