"""`torch_dist` checkpoints, as megatron.core's `dist_checkpointing` writes and reads them, one tensor at a time.

The format is torch's distributed checkpoint (`.metadata`, `*.distcp`) with `common.pt` and `metadata.json` beside it,
so torch alone can write it: without a model, without megatron.core, without more than one tensor in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_llamapro.checkpoint.dist_index import INDEX_NAME, Piece, read_index
from megatron_llamapro.checkpoint.folder import TORCH_DIST_MARK
from megatron_llamapro.checkpoint.weight_map import Shape
from megatron_llamapro.config.errors import CheckpointError

_COMMON = "common.pt"
_DATA = "__0_0.distcp"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# Parts of a training checkpoint that are no weights: their keys start so, or contain it.
_OTHER_STATE = ("optimizer.", "rng_state", "rerun_state_machine_state")
_EXTRA_STATE = "_extra_state"


def write_torch_dist(
    folder: Path, shapes: Mapping[str, Shape], *, dtype: torch.dtype, resolve: Callable[[str], torch.Tensor]
) -> None:
    """Write every tensor of `shapes` to the empty `folder`; `resolve(name)` gives its data when its turn comes.

    The same tensors give the same bytes. (Torch's own writer keeps every tensor until the last is written, and leaves
    the path and a random number in the index.)
    """
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with (folder / _DATA).open("wb") as file, _without_crc():
        for name, shape in shapes.items():
            start = file.tell()
            torch.save(_with_own_storage(resolve(name)), file)
            whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [whole])
            places[MetadataIndex(name, whole.offsets)] = _StorageInfo(_DATA, start, file.tell() - start)
    index = Metadata(entries, storage_data=places, storage_meta=StorageMeta())
    (folder / INDEX_NAME).write_bytes(pickle.dumps(index))
    torch.save({}, folder / _COMMON)
    (folder / TORCH_DIST_MARK).write_text(json.dumps(_BACKENDS), encoding="utf-8")


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Without the checksums in torch's files: the manifest's content hashes do their work, and cost less."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """`torch.save` writes all the memory that a tensor is a view of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class TorchDistReader:
    """An open torch_dist checkpoint: its weights by name, assembled from however many pieces they were saved in.

    Raises (on opening):
        CheckpointError: not such a checkpoint, damaged, or one whose index would run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._tensors = {name: t for name, t in read_index(self.folder).items() if not is_other_state(name)}
        self.shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, as it is stored (a vocabulary may be padded).

        Raises:
            CheckpointError: its file is missing or damaged, or its pieces do not make a whole.
        """
        stored = self._tensors[name]
        pieces = [self._read(name, piece) for piece in stored.pieces]
        if len(pieces) == 1:
            return pieces[0]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        seen = torch.zeros(stored.shape, dtype=torch.bool)
        for piece, values in zip(stored.pieces, pieces, strict=True):
            whole[piece.region] = values
            seen[piece.region] = True
        if not seen.all():
            raise CheckpointError(f"{self.folder}: the pieces of {name} overlap and leave a gap: the index is damaged")
        return whole

    def _read(self, name: str, piece: Piece) -> torch.Tensor:
        try:
            with piece.path.open("rb") as file:
                values = torch.load(_Section(file, piece), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{piece.path}: cannot read {name}: {_first_line(error)}") from None
        if not isinstance(values, torch.Tensor) or values.dtype != self.dtypes[name] or values.shape != piece.shape:
            raise CheckpointError(f"{piece.path}: {name} is not the tensor that the index promises")
        return values


class _Section(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, piece: Piece) -> None:
        self._file = file
        self._start = piece.offset
        self._length = piece.num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view[:wanted])
        self._position += count
        return count


def is_other_state(name: str) -> bool:
    """Whether a key of a training checkpoint is no weight of the model: optimizer, random states, extra state."""
    return name.startswith(_OTHER_STATE) or _EXTRA_STATE in name


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
