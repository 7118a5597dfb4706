"""What the small files of a torch_dist checkpoint say: read once, by one rank, and passed to all who need it."""

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

# What a common state may name, since megatron.core loads it as it is. Nothing here does anything but hold values.
_COMMON_GLOBALS = TORCH_GLOBALS | {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "torch.device",
    *(f"torch.{dtype}" for dtype in ("float32", "float16", "bfloat16", "int64", "int32", "uint8")),
}
_CONVERT = "convert it with llamapro convert megatron-to-megatron"


@dataclass(frozen=True)
class SmallFiles:
    """What the small files of a torch_dist checkpoint say. Each is read when it is first asked for, and only then.

    One rank reads them all and passes what they say to the others, which then read none. Errors are those of the
    functions that read.
    """

    folder: Path

    @cached_property
    def model(self) -> HfModel:
        """config.json"""
        return read_hf_model(self.folder)

    @cached_property
    def index(self) -> dict[str, IndexedTensor]:
        """Every tensor by its key. Those that are no weights are there by name only: a large job has very many."""
        found = read_index(self.folder)
        return {name: replace(held, sections=()) if is_other_state(name) else held for name, held in found.items()}

    @cached_property
    def common_state(self) -> bytes | None:
        """common.pt, None where there is none."""
        return read_inside(self.folder, COMMON_STATE, largest=LARGEST_INDEX)

    @cached_property
    def manifest(self) -> Manifest | None:
        """llamapro.json, None where there is none."""
        return Manifest.find(self.folder)

    @cached_property
    def adapters(self) -> AdapterRecord | None:
        """None where there are none."""
        return AdapterRecord.read(self.folder)

    @cached_property
    def delta(self) -> Delta | None:
        """None where the checkpoint has all weights itself."""
        return Delta.read(self.folder)

    @cached_property
    def base(self) -> SmallFiles | None:
        """Those of the checkpoint that has a delta's other weights."""
        return SmallFiles(self.delta.base_of(self.folder)) if self.delta else None

    def manifest_or_error(self) -> Manifest:
        """The manifest. Raises `CheckpointError` where there is none."""
        return self.manifest or Manifest.read(self.folder)

    def read_all(self) -> SmallFiles:
        """These, every one read, the base's too."""
        for name, held in vars(SmallFiles).items():
            if isinstance(held, cached_property):
                getattr(self, name)
        if self.base:
            self.base.read_all()
        return self

    def check_there(self) -> None:
        """Raise `CheckpointError` where this rank does not see the checkpoint that another one has read."""
        if not is_torch_dist(self.folder):
            raise CheckpointError(f"{self.folder} is not there: put it where every rank sees it, as the first one does")
        if self.delta:
            self.delta.base_of(self.folder)


def check_loadable(small: SmallFiles) -> None:
    """Raise `CheckpointError` where training cannot load a torch_dist checkpoint: a weight is missing, or lies under a
    key that training does not ask for; or megatron.core, which unpickles index and common state as they are, would run
    code."""
    folder, index = small.folder, set(small.index)
    if small.base is not None:
        check_loadable(small.base)
        index |= set(small.base.index)
    if any(map(is_stacked, index)):
        raise CheckpointError(f"{folder} has its layers stacked, and training asks for one key a layer: {_CONVERT}")
    for weight in weights_of(small.model.shape):
        if weight.megatron_name in index:
            continue
        other = next((name for name in weight.megatron_names if name in index), None)
        if other is None:
            raise CheckpointError(f"{folder} lacks the tensor {weight.megatron_name}: take a complete checkpoint")
        raise CheckpointError(f"{folder} has {other} where training asks for {weight.megatron_name}: {_CONVERT}")
    if small.common_state is None:
        return
    try:
        read_archive(io.BytesIO(small.common_state), admitted=_COMMON_GLOBALS)
    except DamagedArchiveError as error:
        raise CheckpointError(f"{folder / COMMON_STATE} was not loaded: {error}") from None
