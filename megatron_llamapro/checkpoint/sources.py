"""Where a conversion's tensors come from: any checkpoint seen as a Hugging Face one, and the expansion of one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from megatron_llamapro.checkpoint.folder import LATEST, is_torch_dist, resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.hf_reader import HFReader
from megatron_llamapro.checkpoint.manifest import Manifest
from megatron_llamapro.checkpoint.megatron_dist import TorchDistReader
from megatron_llamapro.checkpoint.transforms import DTYPES, cast, split
from megatron_llamapro.checkpoint.weight_map import VOCABULARY_ROWS, Weight, hf_name_in_layer, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.families import ModelShape, model_shape, read_hf_config


class TensorSource(Protocol):
    """A model whose tensors can be had one by one, under Hugging Face's names."""

    shape: ModelShape
    dtype: str

    @property
    def plan(self) -> ExpansionPlan: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class MegatronSource:
    """A Megatron checkpoint (torch_dist), seen as a Hugging Face one.

    Raises (on opening):
        CheckpointError: no checkpoint, or tensors that are missing, unknown, of the wrong shape or of mixed types.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = resolve_megatron_checkpoint(folder)
        self.config = read_hf_config(self.folder)
        self.shape = model_shape(self.config)
        self.manifest = Manifest.read(self.folder)
        self.manifest.check_fits(self.shape, where=self.folder)
        self._reader = TorchDistReader(self.folder)
        self._weight_of = {name: weight for weight in weights_of(self.shape) for name in weight.hf_names}
        self._check_tensors()
        self.dtype = self.manifest.dtype
        self._latest: tuple[str, dict[str, torch.Tensor]] = ("", {})

    @property
    def plan(self) -> ExpansionPlan:
        return self.manifest.plan

    def tensor(self, name: str) -> torch.Tensor:
        """A Hugging Face tensor, cut out of megatron.core's, without padding of the vocabulary."""
        weight = self._weight_of[name]
        if self._latest[0] != weight.megatron_name:  # the tensors of one weight are asked for together
            whole = self._reader.tensor(weight.megatron_name)[: weight.megatron_shape[0]]
            parts = split(weight, whole, self.shape)
            self._latest = (weight.megatron_name, dict(zip(weight.hf_names, parts, strict=True)))
        return self._latest[1][name]

    def _check_tensors(self) -> None:
        expected = {weight.megatron_name: weight for weight in self._weight_of.values()}
        stored = self._reader.shapes
        for name, weight in expected.items():
            if name not in stored:
                raise CheckpointError(f"{self.folder} lacks the tensor {name}")
            if not _fits(stored[name], weight):
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {stored[name]}, config.json makes it {weight.megatron_shape}"
                )
            if self._reader.dtypes[name] != DTYPES.get(self.manifest.dtype):
                raise CheckpointError(
                    f"{self.folder}: {name} is {self._reader.dtypes[name]}, its manifest says {self.manifest.dtype}"
                )
        unknown = sorted(set(stored) - set(expected))
        if unknown:
            raise CheckpointError(f"{self.folder} has the tensor {unknown[0]}, which this model family does not have")


def open_checkpoint(folder: Path) -> HFReader | MegatronSource:
    """A checkpoint of either format; of a training run's folder, its newest.

    Raises:
        CheckpointError: neither, or one that is not complete.
    """
    folder = Path(folder)
    is_megatron = is_torch_dist(folder) or (folder / LATEST).is_file()
    return MegatronSource(folder) if is_megatron else HFReader(folder)


def _fits(stored: tuple[int, ...], weight: Weight) -> bool:
    wanted = weight.megatron_shape
    if weight.row.megatron in VOCABULARY_ROWS:
        return stored[1:] == wanted[1:] and stored[0] >= wanted[0]
    return stored == wanted


class ExpandedSource:
    """A Hugging Face checkpoint as the model that a further round of `plan` makes of it, in `dtype`.

    Added blocks are copies of their parents but for the output projections, which are true zeros (never 0 times a
    weight, which can be -0.0 or NaN).
    """

    def __init__(self, source: HFReader, plan: ExpansionPlan, *, shape: ModelShape, dtype: str) -> None:
        self.source = source
        self._plan = plan
        self.shape = shape
        self.dtype = dtype
        self._is_new_round = plan.num_rounds > source.plan.num_rounds
        self._rows = {name: (weight, size) for weight in weights_of(shape) for name, size in _sizes(weight)}

    @property
    def plan(self) -> ExpansionPlan:
        return self._plan

    def tensor(self, name: str) -> torch.Tensor:
        weight, size = self._rows[name]
        if weight.layer is None or not self._is_new_round:
            return self._cast(name, name)
        layer = self.plan.layers[weight.layer]
        if weight.row.zero_in_added and layer.added_in_round == self.plan.num_rounds:
            return torch.zeros(size, dtype=DTYPES[self.dtype])
        return self._cast(hf_name_in_layer(name, layer.parent_layer), name)

    def _cast(self, source_name: str, name: str) -> torch.Tensor:
        return cast(self.source.tensor(source_name), DTYPES[self.dtype], name=name)


def _sizes(weight: Weight) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(weight.hf_names, weight.hf_shapes, strict=True))
