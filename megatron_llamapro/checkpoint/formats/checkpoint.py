"""A checkpoint of any format, opened: what model it is, and where its tensors lie, under Hugging Face's names."""

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
    """How a checkpoint is stored."""

    HUGGING_FACE = "Hugging Face"
    TORCH_DIST = "Megatron, torch_dist"
    LEGACY = "Megatron, legacy"


@dataclass(frozen=True)
class BasePart:
    """The part of a delta checkpoint that lies in its base."""

    folder: Path
    delta: Delta

    def check(self, hashes: Mapping[str, str]) -> None:
        """Raise `CheckpointError` where tensors, whose hashes were found to be these, are not those of the delta."""
        self.delta.check_hashes(self.folder, hashes)


@dataclass(frozen=True)
class Adapter:
    """Of a tensor W, which is W + scaling * B A in truth."""

    a: StoredTensor
    """[rank, columns of W]"""
    b: StoredTensor
    """[rows of W, rank]"""
    scaling: float


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Every name, shape and type was checked; no tensor was read."""

    folder: Path
    format: Format
    config: dict
    """config.json, with its manifest left in."""
    shape: ModelShape
    manifest: Manifest | None
    dtype: str
    """Of all weights, or of most where `other_dtypes` has some; e.g. bfloat16."""
    tensors: Mapping[str, StoredTensor]
    """Under Hugging Face's names, in the order of the forward pass."""
    states: Mapping[Path, FileState] = field(default_factory=dict)
    """What the tensors' files were when their headers were read."""
    stored_head: StoredTensor | None = None
    """The output layer of a model whose head is tied, where it is stored all the same."""
    division: str | None = None
    """How it is divided over ranks, where the format fixes that; e.g. TP 2 x PP 2."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of every (virtual) stage, where the format fixes that."""
    base: BasePart | None = None
    """Where the weights lie that did not train, if this is a delta checkpoint."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """Of some tensors, by the same names; `checkpoint.adapters.rows_of` merges them."""
    other_dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of the tensors that are stored in another type than `dtype`, by name."""

    @property
    def plan(self) -> ExpansionPlan:
        """The plan that the model was expanded with; that of an unexpanded model without a manifest."""
        return self.manifest.plan if self.manifest else ExpansionPlan.unexpanded(self.shape.num_layers)

    @property
    def num_adapters(self) -> int:
        """A linear's counts once, also where it is several of Hugging Face's tensors."""
        return len({adapter.a for adapter in self.adapters.values()})

    @property
    def itemsize(self) -> int:
        """Bytes of a weight in `dtype`."""
        return ITEMSIZES[self.dtype]

    def dtype_of(self, name: str) -> str:
        """The type that a tensor is stored in."""
        return self.other_dtypes.get(name, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        sizes = {name: tensor.num_rows * tensor.num_columns for name, tensor in self.tensors.items()}
        return sum(ITEMSIZES[self.dtype_of(name)] * size for name, size in sizes.items())
