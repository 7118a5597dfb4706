"""The index (`.metadata`) of a torch_dist checkpoint, read without running anything that a hostile one asks for.

It is a pickle. It is read by an unpickler that admits only the classes an index is made of; what it then claims is
held against the files before any memory is given to it.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_llamapro.checkpoint.weight_map import Shape
from megatron_llamapro.config.errors import CheckpointError

INDEX_NAME = ".metadata"

# What an index is made of. Nothing here does anything when it is unpickled.
_CLASSES = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
}


class _Bookkeeping:
    """Stands in for classes of megatron.core that hold nothing which is needed here."""


_STAND_INS = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Bookkeeping,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Bookkeeping,
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, (torch.dtype, torch.layout)):
            return value
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, as one file holds it."""

    start: Shape
    """Where in the tensor it begins."""
    shape: Shape
    path: Path
    offset: int
    """Bytes into the file."""
    num_bytes: int

    @property
    def region(self) -> tuple[slice, ...]:
        """Its place in the tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, in as many pieces as there were ranks that held a part of it."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a torch_dist checkpoint by its key; objects that are no tensors are left out.

    Raises:
        CheckpointError: there is no index, it is damaged or asks for anything but an index's own classes, or it
            promises what its files do not have.
    """
    path = Path(folder) / INDEX_NAME
    metadata = _unpickle(path)
    try:
        return {
            name: _stored_tensor(name, entry, metadata, Path(folder))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def _unpickle(path: Path) -> Metadata:
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: it is not a complete checkpoint") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not the index of a checkpoint, and was not loaded: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path} is not the index of a checkpoint")
    return index


def _stored_tensor(name: str, entry: TensorStorageMetadata, metadata: Metadata, folder: Path) -> StoredTensor:
    pieces = tuple(_piece(MetadataIndex(name, chunk.offsets), chunk.sizes, metadata, folder) for chunk in entry.chunks)
    tensor = StoredTensor(_shape(entry.size), entry.properties.dtype, pieces)
    if not isinstance(tensor.dtype, torch.dtype):
        raise CheckpointError(f"{folder / INDEX_NAME} is damaged: {name} has no type")
    itemsize = tensor.dtype.itemsize
    for piece in pieces:
        ends = [start + size for start, size in zip(piece.start, piece.shape, strict=True)]
        fits = len(ends) == len(tensor.shape) and all(e <= s for e, s in zip(ends, tensor.shape, strict=True))
        if not fits or math.prod(piece.shape) * itemsize > piece.num_bytes:
            raise CheckpointError(f"{folder / INDEX_NAME} is damaged: a piece of {name} does not fit")
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(tensor.shape):
        raise CheckpointError(f"{folder}: {name} is not complete: a part of the checkpoint is missing")
    return tensor


def _piece(index: MetadataIndex, shape: object, metadata: Metadata, folder: Path) -> Piece:
    stored = metadata.storage_data[index]
    name = str(stored.relative_path)
    if Path(name).name != name:
        raise CheckpointError(f"{folder / INDEX_NAME} names the file {name!r}: a checkpoint's files are in its folder")
    path, offset, num_bytes = folder / name, stored.offset, stored.length
    if type(offset) is not int or type(num_bytes) is not int:
        raise ValueError(f"{name!r} holds {num_bytes!r} bytes at {offset!r}")
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks the file {name}, which its index names")
    if offset < 0 or num_bytes < 0 or offset + num_bytes > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated: its index says it holds more")
    return Piece(_shape(index.offset), _shape(shape), path, offset, num_bytes)


def _shape(value: object) -> Shape:
    sizes = tuple(value)  # type: ignore[arg-type]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    return sizes
