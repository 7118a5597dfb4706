"""The content of a torch_dist checkpoint's small files. One rank reads them once and passes it to the others."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_llamapro.checkpoint.formats.adapters import AdapterRecord
from megatron_llamapro.checkpoint.formats.delta import Delta
from megatron_llamapro.checkpoint.formats.folders import COMMON_STATE, is_torch_dist
from megatron_llamapro.checkpoint.formats.megatron_tensors import is_stacked
from megatron_llamapro.checkpoint.formats.torch_archive import TORCH_GLOBALS, DamagedArchiveError, read_archive
from megatron_llamapro.checkpoint.formats.torch_dist_index import (
    LARGEST_INDEX,
    IndexedTensor,
    is_other_state,
    read_index,
)
from megatron_llamapro.checkpoint.tensors.weight_map import weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import read_inside
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.hf_config import HfModel, read_hf_model

# Names that a common state may use, because megatron.core unpickles it directly. They can only hold values.
_COMMON_GLOBALS = TORCH_GLOBALS | {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "torch.device",
    *(f"torch.{dtype}" for dtype in ("float32", "float16", "bfloat16", "int64", "int32", "uint8")),
}
_CONVERT = "convert it with llamapro convert megatron-to-megatron"


@dataclass(frozen=True)
class SmallFiles:
    """The content of the small files of a torch_dist checkpoint. Each file is read on first use, and only once.

    One rank reads them all and passes their content to the others, which then read none. Errors are those of the
    functions that read the files.
    """

    folder: Path

    @cached_property
    def model(self) -> HfModel:
        """config.json"""
        return read_hf_model(self.folder)

    @cached_property
    def index(self) -> dict[str, IndexedTensor]:
        """Every tensor by its key. Tensors that are not weights have no sections: a large job has very many."""
        found = read_index(self.folder)
        return {name: replace(held, sections=()) if is_other_state(name) else held for name, held in found.items()}

    @cached_property
    def common_state(self) -> bytes | None:
        """common.pt, or None if it does not exist."""
        return read_inside(self.folder, COMMON_STATE, largest=LARGEST_INDEX)

    @cached_property
    def manifest(self) -> Manifest | None:
        """llamapro.json, or None if it does not exist."""
        return Manifest.find(self.folder)

    @cached_property
    def adapters(self) -> AdapterRecord | None:
        """The record of adapters, or None if there are none."""
        return AdapterRecord.read(self.folder)

    @cached_property
    def delta(self) -> Delta | None:
        """The record of a delta checkpoint, or None if the checkpoint holds all weights."""
        return Delta.read(self.folder)

    @cached_property
    def base(self) -> SmallFiles | None:
        """The small files of a delta's base, or None if the checkpoint holds all weights."""
        return SmallFiles(self.delta.base_of(self.folder)) if self.delta else None

    def manifest_or_error(self) -> Manifest:
        """Return the manifest, or raise `CheckpointError` if there is none."""
        return self.manifest or Manifest.read(self.folder)

    def read_all(self) -> SmallFiles:
        """Read every file, also those of the base, and return self."""
        for name, held in vars(SmallFiles).items():
            if isinstance(held, cached_property):
                getattr(self, name)
        if self.base:
            self.base.read_all()
        return self

    def check_there(self) -> None:
        """Raise `CheckpointError` if this rank does not see the checkpoint that another one has read."""
        if not is_torch_dist(self.folder):
            raise CheckpointError(f"{self.folder} does not exist on this rank: put it where every rank can read it")
        if self.delta:
            self.delta.base_of(self.folder)


def check_loadable(small: SmallFiles) -> None:
    """Raise `CheckpointError` if training cannot load a torch_dist checkpoint:

    1. A weight is missing, or has a key that training does not ask for.
    2. megatron.core, which unpickles the index and the common state directly, would run code.
    """
    folder, index = small.folder, set(small.index)
    if small.base is not None:
        check_loadable(small.base)
        index |= set(small.base.index)
    if any(map(is_stacked, index)):
        raise CheckpointError(f"{folder} has its layers stacked, but training asks for one key per layer: {_CONVERT}")
    for weight in weights_of(small.model.shape):
        if weight.megatron_name in index:
            continue
        other = next((name for name in weight.megatron_names if name in index), None)
        if other is None:
            raise CheckpointError(f"{folder} lacks the tensor {weight.megatron_name}: use a complete checkpoint")
        raise CheckpointError(f"{folder} has {other}, but training asks for {weight.megatron_name}: {_CONVERT}")
    if small.common_state is None:
        return
    try:
        read_archive(io.BytesIO(small.common_state), admitted=_COMMON_GLOBALS)
    except DamagedArchiveError as error:
        raise CheckpointError(f"{folder / COMMON_STATE} was not loaded: {error}") from None
