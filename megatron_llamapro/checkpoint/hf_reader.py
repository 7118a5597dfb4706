"""Hugging Face checkpoints, read one tensor at a time. Every header is checked before any tensor is read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_llamapro.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_llamapro.checkpoint.transforms import DTYPES
from megatron_llamapro.checkpoint.weight_map import Shape, hf_shapes, is_known_extra
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.families import MANIFEST_KEY, ModelShape, model_shape, read_hf_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class HFReader:
    """An open Hugging Face checkpoint: its configuration, its lineage, and its tensors by name.

    Raises (on opening):
        CheckpointError: no checkpoint, a missing or truncated shard, a tensor that is missing, unknown, of the wrong
            shape or of an unsupported or mixed type, a model that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = read_hf_config(self.folder)
        self.shape: ModelShape = model_shape(self.config)
        self.manifest = self._read_manifest()
        self._files = {path.name: _open_shard(path) for path in _shards(self.folder)}
        self._shard_of = {name: shard for shard, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self._check_index()
        self.dtype = self._check_tensors()

    @property
    def plan(self) -> ExpansionPlan:
        """The plan that this model was expanded with; that of an unexpanded model without a manifest."""
        return self.manifest.plan if self.manifest else ExpansionPlan.unexpanded(self.shape.num_layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors that belong to the model."""
        itemsize = DTYPES[self.dtype].itemsize
        return sum(itemsize * torch.Size(size).numel() for size in hf_shapes(self.shape).values())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored.

        Raises:
            CheckpointError: its shard vanished or changed since it was opened.
        """
        try:
            return self._files[self._shard_of[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / self._shard_of[name]}: cannot read {name}: {error}") from None

    def _read_manifest(self) -> Manifest | None:
        if (self.folder / MANIFEST_NAME).is_file():
            manifest = Manifest.read(self.folder)
        elif MANIFEST_KEY in self.config:
            manifest = Manifest.from_json(self.config[MANIFEST_KEY], where=self.folder / "config.json")
        else:
            return None
        manifest.check_fits(self.shape, where=self.folder)
        return manifest

    def _check_index(self) -> None:
        """Every tensor that the index promises is in the shard it names."""
        index = self.folder / INDEX_FILE
        if not index.is_file() or (self.folder / SINGLE_FILE).is_file():
            return
        for name, shard in _weight_map(index).items():
            if self._shard_of.get(name) != shard:
                raise CheckpointError(
                    f"{self.folder / shard} lacks the tensor {name}, which {INDEX_FILE} says it holds"
                )

    def _check_tensors(self) -> str:
        """Check names, shapes and types; return the one type of all."""
        expected = hf_shapes(self.shape)
        missing = [name for name in expected if name not in self._shard_of]
        if missing:
            raise CheckpointError(f"{self.folder} lacks the tensor {missing[0]}{_and_more(missing)}")
        unknown = [n for n in self._shard_of if n not in expected and not is_known_extra(n, self.shape)]
        if unknown:
            raise CheckpointError(
                f"{self.folder} has the tensor {unknown[0]}{_and_more(unknown)}, which this model family does not "
                "have: it would be lost"
            )
        dtypes = {}
        for name, size in expected.items():
            stored = self._files[self._shard_of[name]].get_slice(name)
            if tuple(stored.get_shape()) != size:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {tuple(stored.get_shape())}, config.json makes it {size}"
                )
            dtypes.setdefault(stored.get_dtype(), name)
        return self._one_dtype(dtypes)

    def _one_dtype(self, dtypes: dict[str, str]) -> str:
        for dtype, name in dtypes.items():
            if dtype not in _SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as {dtype}: only {', '.join(_SAFETENSORS_DTYPES)} are supported"
                )
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise CheckpointError(
                f"{self.folder} mixes types: {first} is {one}, {second} is {other}: save the model in one type"
            )
        return _SAFETENSORS_DTYPES[next(iter(dtypes))]


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, all of them there."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        hint = "it has only pytorch_model*.bin, which runs code when read: save it as safetensors first"
        none = f"no {SINGLE_FILE} and no {INDEX_FILE}: give the folder of a Hugging Face checkpoint"
        raise CheckpointError(f"{folder}: {hint if any(folder.glob('pytorch_model*.bin')) else none}")
    shards = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{folder} lacks the shard {shard.name}, which {INDEX_FILE} names")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, out of the index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {**weight_map}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards: {error!r}") from None
    for shard in names.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard:
            raise CheckpointError(f"{index} names the shard {shard!r}: shards are files in the same folder")
    return names


def _open_shard(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None


def shapes_in_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
