"""Maps tensors of Megatron checkpoints to Hugging Face's, and checks them against the model. Pure.

torch_dist stores a tensor in the parts that ranks saved. It holds one layer, or all layers stacked: megatron.core
stacks layers unless `non_homogeneous_layers` is set. `decoder.layers.mlp.linear_fc2.weight` [layers, rows, columns] is
then that weight of every layer. Norms are [layers, hidden], experts [layers, experts, rows, columns].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint, Format
from megatron_llamapro.checkpoint.tensors.layout import Piece, StoredTensor, is_whole, parts_of
from megatron_llamapro.checkpoint.tensors.streaming import FileState
from megatron_llamapro.checkpoint.tensors.weight_map import VOCABULARY_ROWS, Shape, Weight, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.hf_config import ITEMSIZES, HfModel

_STACKED = re.compile(r"(decoder\.layers\.)(?!\d+\.)(.+)", re.DOTALL)


@dataclass(frozen=True)
class SavedPart:
    """A part of a tensor, stored row-major in `path` from byte `offset`."""

    start: Shape
    """Index of its first element in the tensor."""
    shape: Shape
    """No dimension is 0."""
    path: Path
    offset: int


@dataclass(frozen=True)
class DividedTensor:
    """A tensor in parts, one for each rank that held a part of it."""

    shape: Shape
    dtype: str
    """A key of `ITEMSIZES`."""
    parts: tuple[SavedPart, ...]

    def pieces(self) -> Iterator[Piece]:
        """Yield its parts as pieces of a matrix. All dimensions but the last are the matrix's rows."""
        for part in self.parts:
            yield from _pieces(self, part)


def is_stacked(name: str) -> bool:
    """Return whether a key is a weight of all layers, stacked."""
    return _STACKED.fullmatch(name) is not None


def unstacked(tensors: Mapping[str, DividedTensor], *, num_layers: int, where: Path) -> dict[str, DividedTensor]:
    """Return the tensors by key, with stacked tensors split into one per layer, under the keys of single layers.

    Raises:
        CheckpointError: a stack has another number of layers than the model, or a layer exists twice.
    """
    found = {name: tensor for name, tensor in tensors.items() if not is_stacked(name)}
    for name in sorted(tensors.keys() - found.keys()):
        tensor = tensors[name]
        if len(tensor.shape) < 2 or tensor.shape[0] != num_layers:
            raise CheckpointError(
                f"{where}: {name} has shape {tensor.shape}: it is not a stack of the {num_layers} layers of config.json"
            )
        for layer, one in enumerate(_layers(tensor)):
            key = _STACKED.sub(rf"\g<1>{layer}.\g<2>", name)
            if key in found:
                raise CheckpointError(f"{where} has {key} twice: on its own, and in {name}")
            found[key] = one
    return found


def _layers(tensor: DividedTensor) -> list[DividedTensor]:
    parts: list[list[SavedPart]] = [[] for _ in range(tensor.shape[0])]
    for part in tensor.parts:
        start, shape = part.start[1:], part.shape[1:]
        step = math.prod(shape) * ITEMSIZES[tensor.dtype]
        for number in range(part.shape[0]):
            offset = part.offset + number * step
            parts[part.start[0] + number].append(replace(part, start=start, shape=shape, offset=offset))
    return [DividedTensor(tensor.shape[1:], tensor.dtype, tuple(held)) for held in parts]


def _pieces(tensor: DividedTensor, part: SavedPart) -> Iterator[Piece]:
    """Yield the pieces of a part: one, or one per expert."""
    leading = [range(start, start + size) for start, size in zip(part.start[:-2], part.shape[:-2], strict=True)]
    start, shape = part.start[-2:], part.shape[-2:]
    num_rows, columns = matrix(shape)
    all_rows, _ = matrix(tensor.shape[-2:])
    first_column = start[1] if len(shape) == 2 else 0
    step = math.prod(shape) * ITEMSIZES[tensor.dtype]
    for number, indices in enumerate(product(*leading)):
        outer = 0
        for index, size in zip(indices, tensor.shape, strict=False):
            outer = outer * size + index
        first = outer * all_rows + start[0]
        rows, where = (first, first + num_rows), (first_column, first_column + columns)
        yield Piece(rows, where, part.path, part.offset + number * step)


@dataclass(frozen=True)
class MegatronTensor:
    """A whole tensor of megatron.core's, as it is stored: a vocabulary may be padded."""

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]
    """Pieces of the tensor as a matrix: all dimensions but the last are rows."""


def matrix(shape: Shape) -> tuple[int, int]:
    """Return the rows and columns of a tensor with its leading dimensions flattened. A vector's elements are rows."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def open_megatron(
    folder: Path,
    format: Format,
    model: HfModel,
    manifest: Manifest | None,
    tensors: Mapping[str, MegatronTensor],
    *,
    states: Mapping[Path, FileState],
) -> Checkpoint:
    """Return the Megatron checkpoint with these weights, and with the manifest if it is one of ours.

    `states` are the states of the files, taken before the tensors were located in them.

    Raises:
        CheckpointError: a tensor is missing, unknown, of the wrong shape or type, or not whole; or the manifest does
            not fit.
    """
    shape = model.shape
    if manifest is not None:
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
    """Return the type of the weights: the manifest's, or the one that all have if other software wrote them since."""
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
        raise CheckpointError(f"{folder}: {name} has shape {tensor.shape}, but config.json makes it {wanted}")
    if tensor.dtype != dtype:
        raise CheckpointError(f"{folder}: {name} is {tensor.dtype}, but its manifest or its other weights are {dtype}")


def _check_whole(folder: Path, name: str, parts: Iterable[StoredTensor]) -> None:
    for part in parts:
        if not is_whole(part):
            raise CheckpointError(f"{folder}: the pieces of {name} overlap or leave a gap: it is damaged")
