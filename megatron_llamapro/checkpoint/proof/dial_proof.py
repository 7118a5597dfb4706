"""Proves a dial: every tensor of the dialed checkpoint is computed again, in plain torch, from the one that was dialed.

Values are compared bit for bit. Of a tensor with an adapter, the sum B A may differ between machines in its last bits
of float32, so a range of that width is computed, and both ends are rounded as the conversion rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from megatron_llamapro.checkpoint.dial import output_projections
from megatron_llamapro.checkpoint.formats.adapters import rows_of, undialed_hash
from megatron_llamapro.checkpoint.formats.checkpoint import Adapter, Checkpoint
from megatron_llamapro.checkpoint.lineage import original_name
from megatron_llamapro.checkpoint.proof.same_function import Check
from megatron_llamapro.checkpoint.tensors.computed import cast_along
from megatron_llamapro.checkpoint.tensors.streaming import (
    CHUNK_BYTES,
    Progress,
    Rows,
    SourceFiles,
    StoredRows,
    nothing,
    read_whole,
)
from megatron_llamapro.expansion.dial_record import DialRecord
from megatron_llamapro.families.hf_config import ITEMSIZES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DialProof:
    """The dial from `undialed` to `result`, two checkpoints of one plan. `original` is the model before training."""

    original: Checkpoint
    undialed: Checkpoint
    result: Checkpoint
    files: SourceFiles
    progress: Progress = nothing

    def check(self, pool: ThreadPoolExecutor) -> Check:
        """Compare every tensor of `result` with its value computed again."""
        where, record = self.undialed.folder, self._record
        run, result = self.undialed, self.result
        is_other = run.manifest is None or (run.plan, run.shape) != (result.plan, result.shape) or run.other_dtypes
        if is_other or not record.undialed_hashes.keys() <= run.tensors.keys():
            return Check("dial", ok=False, text=f"{where} is another model than the one that was dialed")
        names = [*record.undialed_hashes]
        found = pool.map(lambda name: undialed_hash(self.undialed, name, self.files), names)
        other = [name for name, value in zip(names, found, strict=True) if value != record.undialed_hashes[name]]
        if other:
            return Check("dial", ok=False, text=f"{where} is not what was dialed: {other[0]} has another hash")
        holds = pool.map(self._holds, self.result.tensors)
        wrong = [name for name, is_right in zip(self.result.tensors, holds, strict=True) if not is_right]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return Check("dial", ok=False, text=f"{wrong[0]}{more} is not {record.last} of {where}")
        how = ", those with adapters to the last bits of float32" if self.undialed.adapters else ", bit for bit"
        text = f"{len(names)} tensors are {record.last} of {where}, all others are equal{how}"
        return Check("dial", ok=True, text=text)

    @property
    def _record(self) -> DialRecord:
        assert self.result.manifest is not None and self.result.manifest.dial is not None
        return self.result.manifest.dial

    @cached_property
    def _outputs(self) -> dict[str, int]:
        return output_projections(self.result.shape, self.result.plan)

    @cached_property
    def _names_in_original(self) -> dict[str | None, str]:
        """Names in the first source model → names in `original`."""
        return {original_name(name, self.original.plan): name for name in self.original.tensors}

    def _holds(self, name: str) -> bool:
        """Return whether a tensor of `result` has its dialed values."""
        import torch

        bits = {2: torch.int16, 4: torch.int32}[self.result.itemsize]
        for start, num_rows in self._portions(name):
            found = self._read(rows_of(self.result, name, self.files), self.result, name, start, num_rows)
            low, high = (end.to(found.dtype) for end in self._expected(name, start, num_rows))
            if name in self.undialed.adapters:
                is_right = bool(((low <= found) & (found <= high)).all())
            else:
                is_right = torch.equal(low.view(bits), found.view(bits))
            if not is_right:
                return False
            self.progress(found.nbytes)
        return True

    def _portions(self, name: str) -> Iterator[tuple[int, int]]:
        tensor = self.result.tensors[name]
        portion = max(1, CHUNK_BYTES // max(1, 8 * tensor.num_columns))
        for start in range(0, tensor.num_rows, portion):
            yield start, min(portion, tensor.num_rows - start)

    def _expected(self, name: str, start: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the largest value that the rows may have, in the type of `undialed`."""
        import torch

        scale, before = self._scale(name), self._before(name, start, num_rows)
        stored = self._read(
            StoredRows(self.undialed.tensors[name], self.files, self.undialed.itemsize),
            self.undialed,
            name,
            start,
            num_rows,
        )
        adapter = self.undialed.adapters.get(name)
        if adapter and before is not None and torch.equal(stored, before):  # the adapter alone moved the original
            return self._merged(stored, adapter, start, factor=scale)
        low, high = self._merged(stored, adapter, start, factor=1.0) if adapter else (stored, stored)
        return _dialed(low, before, scale), _dialed(high, before, scale)

    def _scale(self, name: str) -> float:
        if name in self._outputs:
            return self._record.of_block(self._outputs[name])
        is_original = original_name(name, self.result.plan) is not None
        scale = self._record.added_block_scale
        return scale if is_original and not isinstance(scale, tuple) else 1.0

    def _before(self, name: str, start: int, num_rows: int) -> torch.Tensor | None:
        """Return the rows before training, or None for a tensor of an added block."""
        first = original_name(name, self.result.plan)
        if first is None:
            return None
        assert self.undialed.manifest is not None
        there = self._names_in_original[first]
        types = (self.original.dtype_of(there), *self.undialed.manifest.casts)
        rows = cast_along(rows_of(self.original, there, self.files), types=types, name=name)
        return self._read(rows, self.undialed, name, start, num_rows)

    def _merged(
        self, stored: torch.Tensor, adapter: Adapter, start: int, *, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the largest rounding of stored + factor * scaling * B A."""
        import torch

        itemsize, (rank, _) = self.undialed.itemsize, adapter.a.shape
        a = torch.from_numpy(read_whole(adapter.a, self.files, itemsize)).view(stored.dtype).double()
        b = numpy.empty((len(stored), rank * itemsize), numpy.uint8)
        StoredRows(adapter.b, self.files, itemsize).fill(start, b)
        b = torch.from_numpy(b).view(stored.dtype).double()
        scaling = factor * adapter.scaling
        value, size = stored.double() + scaling * (b @ a), stored.double().abs() + scaling * (b.abs() @ a.abs())
        noise = (rank + 4) * 2.0**-24 * size
        return (value - noise).to(stored.dtype), (value + noise).to(stored.dtype)

    def _read(self, rows: Rows, checkpoint: Checkpoint, name: str, start: int, num_rows: int) -> torch.Tensor:
        """Return rows of a tensor of `checkpoint`, in its type."""
        import torch

        dtype = checkpoint.dtype_of(name)
        raw = numpy.zeros((num_rows, math.prod(checkpoint.tensors[name].shape[1:]) * ITEMSIZES[dtype]), numpy.uint8)
        rows.fill(start, raw)
        return torch.from_numpy(raw).view(getattr(torch, dtype))


def _dialed(after: torch.Tensor, before: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return before + scale * (after - before), or scale * after without a `before`."""
    import torch

    if scale == 1:
        return after
    if before is None:
        return (after.float() * scale).to(after.dtype) if scale else torch.zeros_like(after)
    if scale == 0:
        return before
    moved = before.float() + (after.float() - before.float()) * scale
    return torch.where(after == before, before, moved.to(after.dtype))
