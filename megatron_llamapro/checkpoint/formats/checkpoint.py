"""An opened checkpoint of any format: its model, and where its tensors are stored, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from megatron_llamapro.checkpoint.formats.delta import Delta
from megatron_llamapro.checkpoint.tensors.layout import StoredTensor
from megatron_llamapro.checkpoint.tensors.streaming import FileState
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape


class Format(str, Enum):
    """The format that a checkpoint is stored in."""

    HUGGING_FACE = "Hugging Face"
    TORCH_DIST = "Megatron, torch_dist"
    LEGACY = "Megatron, legacy"


@dataclass(frozen=True)
class BasePart:
    """The part of a delta checkpoint that is stored in its base."""

    folder: Path
    delta: Delta

    def check(self, hashes: Mapping[str, str]) -> None:
        """Raise `CheckpointError` if the base's tensors, which have these hashes, are not those of the delta."""
        self.delta.check_hashes(self.folder, hashes)


@dataclass(frozen=True)
class Adapter:
    """The adapter of a tensor W. The model computes with W + scaling * B A."""

    a: StoredTensor
    """[rank, columns of W]"""
    b: StoredTensor
    """[rows of W, rank]"""
    scaling: float


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor as it was before training."""

    stored: StoredTensor
    types: tuple[str, ...]
    """The type that it is stored in, and those that it is cast to, in turn. The last is that of the trained tensor."""


@dataclass(frozen=True)
class DialedTensor:
    """The dial of a tensor W, merged with its adapter. The model computes with W0 + scale * (W - W0)."""

    scale: float
    original: OriginalTensor | None = None
    """W0; None if it is 0."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Every name, shape and type is checked; no tensor is read yet."""

    folder: Path
    format: Format
    config: dict
    """config.json, with its manifest left in."""
    shape: ModelShape
    manifest: Manifest | None
    dtype: str
    """Type of all weights, e.g. bfloat16. If `other_dtypes` is not empty, the type of most weights."""
    tensors: Mapping[str, StoredTensor]
    """Under Hugging Face's names, in the order of the forward pass."""
    states: Mapping[Path, FileState] = field(default_factory=dict)
    """The states of the tensors' files when their headers were read."""
    stored_head: StoredTensor | None = None
    """The output layer of a model with tied embeddings, if it is stored all the same."""
    division: str | None = None
    """How it is divided over ranks, e.g. TP 2 x PP 2, if the format fixes that."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of every (virtual) stage, if the format fixes that."""
    base: BasePart | None = None
    """The base with the frozen weights, if this is a delta checkpoint."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """Adapters of some tensors, by the same names. `formats.adapters.rows_of` merges them."""
    other_dtypes: Mapping[str, str] = field(default_factory=dict)
    """The types of the tensors that are not stored in `dtype`, by name."""
    averaged_with: Mapping[str, tuple[Checkpoint, ...]] = field(default_factory=dict)
    """The checkpoints whose tensors `formats.adapters.rows_of` averages with this one's, by tensor name."""
    dialed: Mapping[str, DialedTensor] = field(default_factory=dict)
    """Dials of some tensors, by the same names. `formats.adapters.rows_of` applies them."""

    @property
    def plan(self) -> ExpansionPlan:
        """The plan that the model was expanded with. Without a manifest, the plan of an unexpanded model."""
        return self.manifest.plan if self.manifest else ExpansionPlan.unexpanded(self.shape.num_layers)

    @property
    def num_adapters(self) -> int:
        """The number of adapted linears. A linear of several Hugging Face tensors counts once."""
        return len({adapter.a for adapter in self.adapters.values()})

    @property
    def itemsize(self) -> int:
        """Bytes of a weight in `dtype`."""
        return ITEMSIZES[self.dtype]

    def dtype_of(self, name: str) -> str:
        """Return the type that a tensor is stored in."""
        return self.other_dtypes.get(name, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        sizes = {name: tensor.num_rows * tensor.num_columns for name, tensor in self.tensors.items()}
        return sum(ITEMSIZES[self.dtype_of(name)] * size for name, size in sizes.items())
