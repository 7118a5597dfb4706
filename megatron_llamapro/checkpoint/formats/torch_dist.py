"""Reads and lays out `torch_dist` checkpoints, the format of megatron.core's `dist_checkpointing`.

The format is torch's distributed checkpoint. `.metadata` is an index. In `*.distcp` files, every tensor is a
`torch.save` file of its own. `common.pt` and `metadata.json` lie beside them. Neither torch nor megatron.core is
needed.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from megatron_llamapro.checkpoint.formats.adapters import with_adapters
from megatron_llamapro.checkpoint.formats.checkpoint import BasePart, Checkpoint, Format
from megatron_llamapro.checkpoint.formats.delta import DELTA_NAME, Delta
from megatron_llamapro.checkpoint.formats.folders import COMMON_STATE, INDEX_NAME, TORCH_DIST_MARK
from megatron_llamapro.checkpoint.formats.megatron_args import check_common_state
from megatron_llamapro.checkpoint.formats.megatron_tensors import (
    DividedTensor,
    MegatronTensor,
    SavedPart,
    matrix,
    open_megatron,
    unstacked,
)
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.checkpoint.formats.torch_archive import (
    ArchivedTensor,
    ArchiveLayout,
    DamagedArchiveError,
    archive_layout,
    read_archive,
    tensor_call,
)
from megatron_llamapro.checkpoint.formats.torch_dist_index import (
    EXTRA_STATE,
    IndexedTensor,
    Section,
    index_bytes,
    is_other_state,
)
from megatron_llamapro.checkpoint.tensors.layout import Piece, StoredTensor, TargetFile, TargetLayout, parts_of
from megatron_llamapro.checkpoint.tensors.streaming import allow_many_open_files, state_of
from megatron_llamapro.checkpoint.tensors.weight_map import Weight, frozen_names, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.trainable import is_adapter
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape

DEFAULT_MAX_FILE_BYTES = 2 * 10**9

# Values that Megatron-LM reads from a checkpoint's common state: each layer has its own keys, and QKV rows are stored
# by query group (version 3.0 and later; megatron/training/checkpointing.py, core_v0.16.1).
_COMMON_STATE = {
    "content_metadata": {"non_homogeneous_layers": True},
    "checkpoint_version": 3.0,
    "iteration": 0,
}

_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def open_torch_dist(folder: Path) -> Checkpoint:
    """Open a checkpoint in torch_dist format, saved by any layout of ranks, with layers stacked or separate.

    A delta checkpoint is opened with its base, as the whole model. Adapters are noted beside their weights.

    Raises:
        CheckpointError: there is no such checkpoint; it is damaged or incomplete; it does not fit its config.json; its
            pickles would run code; or the base of a delta does not exist.
    """
    return locate_tensors(SmallFiles(Path(folder)))


def locate_tensors(small: SmallFiles) -> Checkpoint:
    """Open the checkpoint with these small files. Raises what `open_torch_dist` raises."""
    folder, model = small.folder, small.model
    if small.common_state is not None:
        check_common_state(small.common_state, model.shape, where=folder)
    indexed = _indexed_weights(small)
    delta, base = small.delta, small.base
    if delta and base:
        indexed = {**_taken_from(base, delta, model.shape), **_held_by(folder, indexed, delta)}
    states = {path: state_of(path) for path in {part.path for held in indexed.values() for part in held.sections}}
    with _SectionFiles() as files:
        located = {name: _located(name, tensor, files) for name, tensor in indexed.items()}
    divided = unstacked(located, num_layers=model.shape.num_layers, where=folder)
    tensors = {name: MegatronTensor(held.shape, held.dtype, tuple(held.pieces())) for name, held in divided.items()}
    matrices = {name: tensors.pop(name) for name in [*tensors] if is_adapter(name)}
    checkpoint = open_megatron(folder, Format.TORCH_DIST, model, small.manifest, tensors, states=states)
    checkpoint = with_adapters(checkpoint, small.adapters, matrices, states)
    return replace(checkpoint, base=_base_part(checkpoint, base.folder, delta)) if delta and base else checkpoint


def _indexed_weights(small: SmallFiles) -> dict[str, IndexedTensor]:
    weights = {name: held for name, held in small.index.items() if held.shape and not is_other_state(name)}
    _check_types(weights, where=small.folder)
    return weights


def _held_by(folder: Path, indexed: dict[str, IndexedTensor], delta: Delta) -> dict[str, IndexedTensor]:
    """Return a delta's own weights. They must be exactly those that it names: otherwise a lost weight would silently be
    taken from the base."""
    differing = sorted(indexed.keys() ^ set(delta.trained))
    if differing:
        raise CheckpointError(f"{folder}: {differing[0][:200]} is in its index or in {DELTA_NAME}, but not in both")
    return indexed


def _taken_from(base: SmallFiles, delta: Delta, shape: ModelShape) -> dict[str, IndexedTensor]:
    """Return the weights that a delta takes from its base. If a weight has two keys in the base and trained under one,
    neither is taken."""
    trained = set(delta.trained)
    names = {
        name for weight in weights_of(shape) for name in weight.megatron_names if trained & {*weight.megatron_names}
    }
    return {name: held for name, held in _indexed_weights(base).items() if name not in names | trained}


def _base_part(checkpoint: Checkpoint, base: Path, delta: Delta) -> BasePart:
    names = set(frozen_names(checkpoint.shape, delta.trained))
    differing = sorted(names ^ delta.base_hashes.keys())
    if differing:
        raise CheckpointError(f"{checkpoint.folder / DELTA_NAME} is damaged: it has no hash of {differing[0][:200]}")
    return BasePart(base, delta)


def _check_types(tensors: Mapping[str, IndexedTensor], *, where: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in ITEMSIZES:
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}: weights must be {', '.join(ITEMSIZES)}")


def _located(name: str, tensor: IndexedTensor, files: _SectionFiles) -> DividedTensor:
    parts: list[SavedPart] = []
    for section in tensor.sections:
        if 0 in section.shape:
            continue
        stored = files.tensor(name, section)
        if stored.dtype != tensor.dtype or stored.shape != section.shape:
            raise CheckpointError(f"{section.path}: {name} is not the tensor that the index promises")
        parts.append(SavedPart(section.start, section.shape, section.path, stored.offset))
    return DividedTensor(tensor.shape, tensor.dtype, tuple(parts))


class _SectionFiles:
    """Opens each file once, and finds a section's tensor in it."""

    def __init__(self) -> None:
        allow_many_open_files()
        self._open: dict[Path, BinaryIO] = {}

    def __enter__(self) -> _SectionFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for file in self._open.values():
            file.close()

    def tensor(self, name: str, section: Section) -> ArchivedTensor:
        """Return the section's tensor, with its offset in the file."""
        try:
            if section.path not in self._open:
                self._open[section.path] = section.path.open("rb")
            value = read_archive(io.BufferedReader(_Window(self._open[section.path], section)))
        except (OSError, DamagedArchiveError) as error:
            raise CheckpointError(f"{section.path}: cannot read {name}: {error}") from None
        if not isinstance(value, ArchivedTensor):
            raise CheckpointError(f"{section.path}: {name} is not a tensor")
        return replace(value, offset=section.offset + value.offset)


class _Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, section: Section) -> None:
        self._file, self._start, self._length = file, section.offset, section.num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._position))
        data = os.pread(self._file.fileno(), wanted, self._start + self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def torch_dist_layout(
    folder: Path, shape: ModelShape, dtype: str, *, max_file_bytes: int = DEFAULT_MAX_FILE_BYTES
) -> TargetLayout:
    """Return the layout of a checkpoint of whole tensors, in files of about `max_file_bytes`.

    Any layout of ranks can load it. The same model gives the same bytes.
    """
    files = _NewFiles(folder, max_file_bytes)
    tensors: dict[str, tuple[StoredTensor, ...]] = {}
    indexed: dict[str, IndexedTensor] = {}
    objects: dict[str, Section] = {}
    for weight in weights_of(shape):
        size = weight.megatron_shape
        rows, columns = matrix(size)
        archive = archive_layout(tensor_call("0", dtype, size), [rows * columns * ITEMSIZES[dtype]])
        section, offset = files.add(archive, size)
        indexed.update(dict.fromkeys(weight.megatron_names, IndexedTensor(size, dtype, (section,))))
        piece = Piece((0, rows), (0, columns), section.path, offset)
        parts = parts_of(weight, [piece], shape=shape, itemsize=ITEMSIZES[dtype])
        tensors.update({name: (part,) for name, part in parts.items()})
        for name in _extra_states_of(weight):
            objects[name] = files.add(archive_layout([None], []), ())[0]
    small = {
        INDEX_NAME: index_bytes(indexed, objects, dtype),
        COMMON_STATE: _whole_file(archive_layout(_COMMON_STATE, [])),
        TORCH_DIST_MARK: json.dumps(_BACKENDS).encode(),
    }
    return TargetLayout(tensors, files.finished(), small)


def _extra_states_of(weight: Weight) -> list[str]:
    """Return the keys of the extra state (Transformer Engine's FP8 scales) that a linear, or each expert's linear, asks
    for besides its weight. The state is None if it was never trained in FP8."""
    module, _, kind = weight.megatron_name.rpartition(".")
    if kind != "weight" or not module.rpartition(".")[2].startswith("linear_"):
        return []
    experts = weight.num_experts
    return [f"{module}.{EXTRA_STATE}/shard_{expert}_{experts}" for expert in range(experts)]


def _whole_file(archive: ArchiveLayout) -> bytes:
    data = bytearray(archive.num_bytes)
    for offset, part in archive.fixed:
        data[offset : offset + len(part)] = part
    return bytes(data)


class _NewFiles:
    """Places sections one after the other, and starts a new file when one is full."""

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_file_bytes
        self._done: list[TargetFile] = []
        self._begin()

    def _begin(self) -> None:
        self._path = self._folder / f"__0_{len(self._done)}.distcp"
        self._fixed: list[tuple[int, bytes]] = []
        self._position = 0

    def add(self, archive: ArchiveLayout, shape: tuple[int, ...]) -> tuple[Section, int]:
        """Add a tensor. Return its section, and the offset of the tensor's bytes in the file."""
        if self._position and self._position + archive.num_bytes > self._max_bytes:
            self._end()
        start = self._position
        self._fixed.extend((start + offset, data) for offset, data in archive.fixed)
        self._position += archive.num_bytes
        section = Section((0,) * len(shape), shape, self._path, start, archive.num_bytes)
        return section, start + (archive.tensor_offsets or (0,))[0]

    def _end(self) -> None:
        self._done.append(TargetFile(self._path, self._position, tuple(self._fixed)))
        self._begin()

    def finished(self) -> tuple[TargetFile, ...]:
        self._end()
        return tuple(self._done)
