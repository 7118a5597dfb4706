"""Which original tensors of a checkpoint were trained, and their values before.

The manifest has a hash of every original tensor as it was expanded. A tensor with another hash was trained. A tensor of
another checkpoint is its value before training if it has that hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megatron_llamapro.checkpoint.formats.adapters import original_rows
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint, OriginalTensor
from megatron_llamapro.checkpoint.formats.torch_dist import open_torch_dist
from megatron_llamapro.checkpoint.lineage import original_name
from megatron_llamapro.checkpoint.tensors.streaming import FileState, SourceFiles, hash_rows, stored_hash
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.hf_config import ITEMSIZES


@dataclass(frozen=True)
class BeforeTraining:
    """The original tensors that were trained, as they were before, and the states of their files."""

    tensors: Mapping[str, OriginalTensor]
    states: Mapping[Path, FileState]


@dataclass(frozen=True)
class OriginalsFinder:
    """Finds the original tensors that were trained. The manifest's hashes prove their values before training."""

    checkpoint: Checkpoint
    manifest: Manifest
    files: SourceFiles
    pool: ThreadPoolExecutor

    def before(self, originals: Sequence[str], original: Checkpoint | None) -> BeforeTraining:
        """Find those of `originals` that were trained. Raises what `dial.dialed` raises."""
        if original is not None:
            return BeforeTraining(self._differing_from(self._proven(originals, original)), original.states)
        if self.manifest.hash_dtype != self.checkpoint.dtype:
            raise CheckpointError(
                f"{self.checkpoint.folder} was cast from {self.manifest.hash_dtype} to {self.checkpoint.dtype}, so its "
                "hashes do not show which original weights were trained: give --original, the model before training"
            )
        now, noted = self._hashes_now(originals), self.manifest.original_hashes
        moved = [name for name in originals if now[name] != noted.get(self._first(name))]
        return self._in_base(moved) if moved else BeforeTraining({}, {})

    def hashes(self, names: Iterable[str], hash_of: Callable[[str], str]) -> dict[str, str]:
        """Return the hash of every name, computed on all threads."""
        names = list(names)
        return dict(zip(names, self.pool.map(hash_of, names), strict=True))

    def _first(self, name: str) -> str:
        return str(original_name(name, self.checkpoint.plan))

    def _hashes_now(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hashes of stored tensors. A delta has noted those of its base."""
        base = self.checkpoint.base
        noted = base.delta.base_hashes if base else {}
        itemsize = self.checkpoint.itemsize
        return self.hashes(
            names, lambda name: noted.get(name) or stored_hash(self.checkpoint.tensors[name], self.files, itemsize)
        )

    def _differing_from(self, before: Mapping[str, OriginalTensor]) -> dict[str, OriginalTensor]:
        """Return those of `before` that are not the tensors of this checkpoint."""
        now = self._hashes_now(before)
        then = self.hashes(before, lambda name: self._hash_before(before[name], name, before[name].types))
        return {name: tensor for name, tensor in before.items() if now[name] != then[name]}

    def _hash_before(self, tensor: OriginalTensor, name: str, types: tuple[str, ...]) -> str:
        rows = original_rows(dataclasses.replace(tensor, types=types), name, self.files)
        return hash_rows(rows, tensor.stored, ITEMSIZES[types[-1]])

    def _proven(self, names: Sequence[str], model: Checkpoint) -> dict[str, OriginalTensor]:
        """Return the tensors of another checkpoint by their names in this one.

        Raises:
            CheckpointError: one does not have the hash in the manifest.
        """
        there = {original_name(name, model.plan): name for name in model.tensors}
        found: dict[str, OriginalTensor] = {}
        for name in names:
            other = there.get(self._first(name))
            if other is None or model.tensors[other].shape != self.checkpoint.tensors[name].shape:
                raise self._another_model(model, name)
            types = (model.dtype_of(other), *self.manifest.casts)
            found[name] = OriginalTensor(model.tensors[other], tuple(dtype for dtype, _ in groupby(types)))
        hashed_as = self.manifest.hash_dtype

        def hash_of(name: str) -> str:
            stored = found[name].types[0]
            types = (stored,) if stored == hashed_as else (stored, hashed_as)
            return self._hash_before(found[name], name, types)

        for name, value in self.hashes(names, hash_of).items():
            if value != self.manifest.original_hashes.get(self._first(name)):
                raise self._another_model(model, name)
        return found

    def _another_model(self, model: Checkpoint, name: str) -> CheckpointError:
        return CheckpointError(
            f"{model.folder} is not the original of {self.checkpoint.folder}: its {self._first(name)} is not the one "
            "whose hash llamapro.json has: give --original, the model before training"
        )

    def _in_base(self, moved: Sequence[str]) -> BeforeTraining:
        """Find tensors in the base of a delta, if it holds them as they were before training."""
        part = self.checkpoint.base
        if part is not None and not any(name in part.delta.base_hashes for name in moved):
            base = open_torch_dist(part.folder)
            with contextlib.suppress(CheckpointError):  # the base was itself made from a trained checkpoint
                return BeforeTraining(self._proven(moved, base), base.states)
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        raise CheckpointError(
            f"{self.checkpoint.folder}: the original tensor {moved[0]}{more} was trained, so the dial needs its value "
            "before training: give --original, the model before training"
        )
