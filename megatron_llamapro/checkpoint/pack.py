"""A pack: the added blocks of one run, alone, bound by hashes to the model that they were added to.

Its folder holds the blocks' tensors under their Hugging Face names in the expanded model, and a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_llamapro.checkpoint.formats.folders import read_record, write_record
from megatron_llamapro.checkpoint.formats.hf_reader import read_header
from megatron_llamapro.checkpoint.formats.hf_tensors import PACK_NAME, SAFETENSORS_DTYPES
from megatron_llamapro.checkpoint.tensors.layout import StoredTensor, whole
from megatron_llamapro.checkpoint.tensors.streaming import FileState, combined_hash, state_of
from megatron_llamapro.checkpoint.tensors.weight_map import Shape, hf_shapes, layer_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.hf_config import HfModel, model_shape
from megatron_llamapro.families.shape import ModelShape

BLOCKS_FILE = "added_blocks.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackRecord:
    """The record of a pack, in `llamapro_pack.json`."""

    model: HfModel
    """The expanded model, without a manifest in its config."""
    manifest: Manifest
    """The expanded model's. It has the hash of every original tensor."""
    block_hashes: Mapping[str, str]
    """BLAKE3 of every tensor of the blocks, by its Hugging Face name in the expanded model."""

    @property
    def hash(self) -> str:
        """One hash of all tensors of the blocks."""
        return combined_hash(self.block_hashes)

    @classmethod
    def read(cls, folder: Path) -> PackRecord | None:
        """Return the record in a folder, or None if there is none.

        Raises:
            CheckpointError: the record is damaged, or of another version, or of a model that is not supported.
        """
        path = Path(folder) / PACK_NAME
        record = read_record(folder, PACK_NAME, format_version=FORMAT_VERSION, build=partial(cls._of, where=path))
        if record is not None:
            record.manifest.check_fits(record.model.shape, where=path)
        return record

    @classmethod
    def _of(cls, data: dict, *, where: Path) -> PackRecord:
        config, manifest = {**data["config"]}, Manifest.from_json(data["manifest"], where=where)
        try:
            record = cls(HfModel(config, model_shape(config)), manifest, {**data["block_hashes"]})
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        for text in (*record.block_hashes, *record.block_hashes.values()):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not text")
        if data["hash"] != record.hash or data["base_hash"] != combined_hash(record.manifest.original_hashes):
            raise ValueError("its hashes do not match")
        if record.manifest.plan.num_rounds != 1:
            raise ValueError(f"{record.manifest.plan.num_rounds} rounds")
        return record

    def write(self, folder: Path) -> None:
        """Write `llamapro_pack.json`. What the manifest already says is repeated for people."""
        plan = self.manifest.plan
        fields = {
            "family": self.manifest.family,
            "dtype": self.manifest.dtype,
            "positions": list(plan.added_layers),
            "copied_from": [plan.layers[layer].source_layer for layer in plan.added_layers],
            "hash": self.hash,
            "base_hash": combined_hash(self.manifest.original_hashes),
            "block_hashes": dict(self.block_hashes),
            "config": self.model.config,
            "manifest": self.manifest.to_json(),
        }
        write_record(folder, PACK_NAME, format_version=FORMAT_VERSION, fields=fields)


@dataclass(frozen=True)
class Pack:
    """An opened pack. Names, shapes and types are checked; no tensor is read yet."""

    folder: Path
    record: PackRecord
    tensors: Mapping[str, StoredTensor]
    """By the Hugging Face names of the expanded model."""
    states: Mapping[Path, FileState]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def manifest(self) -> Manifest:
        return self.record.manifest

    @property
    def plan(self) -> ExpansionPlan:
        return self.record.manifest.plan

    @property
    def base_shape(self) -> ModelShape:
        """Shape of the model that the blocks were added to."""
        return self.record.model.shape.with_layers(self.plan.original_layers)


def open_pack(folder: Path) -> Pack:
    """Open a pack.

    Raises:
        CheckpointError: the folder is not a pack, or it is damaged.
    """
    folder = Path(folder)
    record, path = PackRecord.read(folder), file_inside(folder, BLOCKS_FILE)
    if record is None:
        raise CheckpointError(f"{folder} is not a pack, it has no {PACK_NAME}: make one with llamapro extract")
    if path is None:
        raise CheckpointError(f"{folder} lacks the file {BLOCKS_FILE}: copy the whole pack")
    state, entries = state_of(path), read_header(path)
    dtype = SAFETENSORS_DTYPES[record.manifest.dtype]
    expected = block_tensors(record.model.shape, record.manifest.plan)
    if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != {
        name: (dtype, size) for name, size in expected.items()
    } or record.block_hashes.keys() != expected.keys():
        raise CheckpointError(f"{path} does not hold the tensors that {PACK_NAME} describes: extract the pack again")
    tensors = {name: whole(size, path, entries[name].offset) for name, size in expected.items()}
    return Pack(folder, record, tensors, {path: state})


def block_tensors(shape: ModelShape, plan: ExpansionPlan) -> dict[str, Shape]:
    """Return the name and shape of every tensor of the added blocks."""
    added = set(plan.added_layers)
    return {name: size for name, size in hf_shapes(shape).items() if layer_of(name) in added}
