"""Low-rank adapters of a training checkpoint: their record, and the weights with the adapters merged.

A checkpoint with adapters is opened as the model that it computes, W + alpha / rank * B A. Every tool sees merged
weights, and dialed ones if the checkpoint is dialed. They are computed a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blake3 import blake3

from megatron_llamapro.checkpoint.formats.checkpoint import Adapter, Checkpoint, OriginalTensor
from megatron_llamapro.checkpoint.formats.folders import read_record, write_record
from megatron_llamapro.checkpoint.formats.megatron_tensors import MegatronTensor
from megatron_llamapro.checkpoint.tensors.computed import DialedRows, MeanRows, MergedRows, ZeroRows, cast, cast_along
from megatron_llamapro.checkpoint.tensors.layout import StoredTensor, is_whole, parts_of
from megatron_llamapro.checkpoint.tensors.streaming import (
    FileState,
    Rows,
    SourceFiles,
    StoredRows,
    read_whole,
    stored_hash,
)
from megatron_llamapro.checkpoint.tensors.weight_map import Weight, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.trainable import LORA_A, LORA_B
from megatron_llamapro.families.hf_config import ITEMSIZES

RECORD_NAME = "llamapro_lora.json"
FORMAT_VERSION = 1

_WEIGHT = ".weight"


@dataclass(frozen=True)
class AdapterRecord:
    """A checkpoint's record of its adapters. Their matrices are among its tensors."""

    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        """The factor before B A."""
        return self.alpha / self.rank

    @classmethod
    def read(cls, folder: Path) -> AdapterRecord | None:
        """Return the record of a checkpoint folder, or None if it has no adapters.

        Raises:
            CheckpointError: the record is damaged, or of another version.
        """
        return read_record(folder, RECORD_NAME, format_version=FORMAT_VERSION, build=cls._of)

    @classmethod
    def _of(cls, data: dict) -> AdapterRecord:
        rank, alpha = data["rank"], data["alpha"]
        if type(rank) is not int or rank < 1 or not 0 < float(alpha) < float("inf"):
            raise ValueError(f"rank {rank!r}, alpha {alpha!r}")
        return cls(rank, float(alpha))

    def write(self, folder: Path) -> None:
        """Write `llamapro_lora.json`."""
        write_record(folder, RECORD_NAME, format_version=FORMAT_VERSION, fields=asdict(self))


def with_adapters(
    checkpoint: Checkpoint,
    record: AdapterRecord | None,
    matrices: Mapping[str, MegatronTensor],
    states: Mapping[Path, FileState],
) -> Checkpoint:
    """Return `checkpoint` with its adapters.

    `matrices` are the adapters' tensors by megatron.core's keys, and `states` the states of all its files.

    Raises:
        CheckpointError: an adapter lacks its other half, its weight or its record, or has another shape or type.
    """
    if (record is None) is not (not matrices):
        there, lacks = (RECORD_NAME, "adapters") if record else ("adapters", RECORD_NAME)
        raise CheckpointError(f"{checkpoint.folder} has {there} but no {lacks}: use a complete checkpoint")
    if record is None:
        return checkpoint
    found: dict[str, Adapter] = {}
    known = set()
    for weight in weights_of(checkpoint.shape):
        stem = weight.megatron_name.removesuffix(_WEIGHT)
        if not {stem + LORA_A, stem + LORA_B} & matrices.keys():
            continue
        known |= {stem + LORA_A, stem + LORA_B}
        found.update(_adapters_of(checkpoint, weight, stem, matrices, record))
    unknown = sorted(matrices.keys() - known)
    if unknown:
        raise CheckpointError(f"{checkpoint.folder} has the adapter {unknown[0][:200]}, but no such weight")
    files = {piece.file for adapter in found.values() for half in (adapter.a, adapter.b) for piece in half.pieces}
    return replace(checkpoint, adapters=found, states={**checkpoint.states, **{file: states[file] for file in files}})


def _adapters_of(
    checkpoint: Checkpoint, weight: Weight, stem: str, matrices: Mapping[str, MegatronTensor], record: AdapterRecord
) -> dict[str, Adapter]:
    """Return the adapters of a weight's Hugging Face tensors: each shares the weight's A, and has its own rows of B."""
    rows, columns = weight.megatron_shape
    wanted = {stem + LORA_A: (record.rank, columns), stem + LORA_B: (rows, record.rank)}
    for name, size in wanted.items():
        held = matrices.get(name)
        if held is None or held.shape != size or held.dtype != checkpoint.dtype:
            is_now = f"is {held.dtype} {list(held.shape)}" if held else "does not exist"
            raise CheckpointError(f"{checkpoint.folder}: {name} {is_now}; it must be {checkpoint.dtype} {list(size)}")
    a = StoredTensor(wanted[stem + LORA_A], matrices[stem + LORA_A].pieces)
    narrow = replace(weight, hf_shapes=tuple((size[0], record.rank) for size in weight.hf_shapes))
    parts = parts_of(narrow, matrices[stem + LORA_B].pieces, shape=checkpoint.shape, itemsize=checkpoint.itemsize)
    if not all(map(is_whole, (a, *parts.values()))):
        raise CheckpointError(f"{checkpoint.folder}: the pieces of the adapter of {stem} overlap or leave a gap")
    return {name: Adapter(a, b, record.scaling) for name, b in parts.items()}


def rows_of(checkpoint: Checkpoint, name: str, files: SourceFiles, *, dtype: str | None = None) -> Rows:
    """Return the rows of a checkpoint's tensor in `dtype` (default: the type that it is stored in).

    It is merged with its adapter, averaged with the same tensor of other checkpoints, and dialed, if the checkpoint has
    these; then it is cast.
    """
    stored = checkpoint.dtype_of(name)
    return cast(_dialed_rows(checkpoint, name, files), source=stored, target=dtype or stored, name=name)


def original_rows(tensor: OriginalTensor, name: str, files: SourceFiles) -> Rows:
    """Return the rows of a tensor as it was before training, in the last of its types."""
    return cast_along(StoredRows(tensor.stored, files, ITEMSIZES[tensor.types[0]]), types=tensor.types, name=name)


def _dialed_rows(checkpoint: Checkpoint, name: str, files: SourceFiles) -> Rows:
    dial, rows = checkpoint.dialed.get(name), _mean_rows(checkpoint, name, files)
    if dial is None:
        return rows
    original = original_rows(dial.original, name, files) if dial.original else None
    if dial.scale == 0:
        return original or ZeroRows()
    return DialedRows(rows, original=original, scale=dial.scale, dtype=checkpoint.dtype_of(name), name=name)


def _mean_rows(checkpoint: Checkpoint, name: str, files: SourceFiles) -> Rows:
    rows = [_merged_rows(each, name, files) for each in (checkpoint, *checkpoint.averaged_with.get(name, ()))]
    return MeanRows(*rows, dtype=checkpoint.dtype_of(name)) if len(rows) > 1 else rows[0]


def _merged_rows(checkpoint: Checkpoint, name: str, files: SourceFiles) -> Rows:
    itemsize = ITEMSIZES[checkpoint.dtype_of(name)]
    rows = StoredRows(checkpoint.tensors[name], files, itemsize)
    adapter = checkpoint.adapters.get(name)
    if adapter is None:
        return rows
    return MergedRows(
        rows,
        read_a=lambda: read_whole(adapter.a, files, itemsize),
        b=StoredRows(adapter.b, files, itemsize),
        scaling=adapter.scaling,
        dtype=checkpoint.dtype,
    )


def unmerged_hash(checkpoint: Checkpoint, name: str, hashes: Mapping[str, str], files: SourceFiles) -> str:
    """Return the hash of a tensor as it is stored. `hashes` are the hashes of the merged and dialed tensors."""
    if name not in checkpoint.adapters and name not in checkpoint.dialed:
        return hashes[name]
    return stored_hash(checkpoint.tensors[name], files, ITEMSIZES[checkpoint.dtype_of(name)])


def undialed_hash(checkpoint: Checkpoint, name: str, files: SourceFiles) -> str:
    """Return the hash of a tensor as it is stored, before any dial. With an adapter, it is the hash of the hashes of W,
    A and B: the bits of a merged tensor may differ between machines."""
    itemsize, adapter = ITEMSIZES[checkpoint.dtype_of(name)], checkpoint.adapters.get(name)
    stored = [checkpoint.tensors[name], *([adapter.a, adapter.b] if adapter else [])]
    hashes = [stored_hash(tensor, files, itemsize) for tensor in stored]
    return hashes[0] if adapter is None else blake3(" ".join(hashes).encode()).hexdigest()
