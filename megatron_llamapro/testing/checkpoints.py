"""Reads the tensors of a checkpoint for tests, with our code or with torch's, and damages indices."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_llamapro.checkpoint.formats.open import OpenTensors, open_checkpoint
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint of any format, by its Hugging Face name."""
    checkpoint = open_checkpoint(folder)
    with SourceFiles() as files:
        tensors = OpenTensors(checkpoint, files)
        return {name: tensors.tensor(name) for name in checkpoint.tensors}


def read_with_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a torch_dist checkpoint by its Megatron key, read by torch's distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = dcp.FileSystemReader(folder).read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def stack_layers(source: Path, target: Path) -> Path:
    """Write one of our torch_dist checkpoints with its layers stacked, each stack in one piece, saved by torch."""
    import torch.distributed.checkpoint as dcp

    tensors = read_with_torch(source)
    layers: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(number) for number in re.findall(r"\.(\d+)\.", name)]):
        layers.setdefault(re.sub(r"(decoder\.layers)\.\d+", r"\1", name), []).append(tensors[name])
    stacks = {name: torch.stack(held) if "decoder.layers." in name else held[0] for name, held in layers.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(stacks, checkpoint_id=target, no_dist=True)
    for name in ("config.json", "llamapro.json", "metadata.json", "common.pt"):
        shutil.copy(source / name, target)
    return target


def edit_dist_index(folder: Path, edit: Callable[[Any], object]) -> None:
    """Change the index of a torch_dist checkpoint of ours or of megatron.core's. `edit` changes the unpickled index in
    place or returns a new one."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    replaced = edit(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index if replaced is None else replaced))
