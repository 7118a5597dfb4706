"""Opens a checkpoint of any format, and reads its tensors one by one as torch tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy

from megatron_llamapro.checkpoint.formats.adapters import rows_of
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.folders import LATEST, is_torch_dist, resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.formats.hf_reader import open_hf
from megatron_llamapro.checkpoint.formats.legacy_reader import is_legacy, open_legacy
from megatron_llamapro.checkpoint.formats.torch_dist import open_torch_dist
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape

if TYPE_CHECKING:
    import torch


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint of any format. Of a training run's folder, open the newest one.

    Raises:
        CheckpointError: the folder has no checkpoint, or it is incomplete, damaged or hostile.
    """
    folder = Path(folder)
    is_megatron = is_torch_dist(folder) or (folder / LATEST).is_file() or is_legacy(folder)
    return open_megatron_checkpoint(folder) if is_megatron else open_hf(folder)


def open_megatron_checkpoint(folder: Path) -> Checkpoint:
    """Open a Megatron checkpoint of either format, or a run's newest. Raises what `open_checkpoint` raises."""
    if is_legacy(folder):
        return open_legacy(folder)
    return open_torch_dist(resolve_megatron_checkpoint(folder))


class TensorSource(Protocol):
    """A model whose tensors can be read one by one, under Hugging Face's names."""

    shape: ModelShape

    def tensor(self, name: str) -> torch.Tensor: ...


class OpenTensors:
    """The tensors of an opened checkpoint. Each is read when it is requested."""

    def __init__(self, checkpoint: Checkpoint, files: SourceFiles) -> None:
        self.checkpoint, self._files = checkpoint, files
        self.shape = checkpoint.shape

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor in the type that it is stored in, merged with its adapter if it has one.

        Raises:
            CheckpointError: its file vanished or changed since it was opened.
        """
        import torch

        stored, dtype = self.checkpoint.tensors[name], self.checkpoint.dtype_of(name)
        values = numpy.empty((stored.num_rows, stored.num_columns * ITEMSIZES[dtype]), numpy.uint8)
        rows_of(self.checkpoint, name, self._files).fill(0, values)
        return torch.from_numpy(values).view(getattr(torch, dtype)).reshape(stored.shape)
