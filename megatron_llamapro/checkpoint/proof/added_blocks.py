"""What has become of the blocks that an expansion added: identities still, trained, or neither, which is a fault.

How a block began is computed by what the conversion takes its rows from (`Origins`), a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import numpy

from megatron_llamapro.checkpoint.formats.adapters import rows_of
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.lineage import Origins, after_rounds, is_zeroed
from megatron_llamapro.checkpoint.tensors.computed import NormalRows, cast_along
from megatron_llamapro.checkpoint.tensors.streaming import Progress, Rows, SourceFiles, hash_rows, nothing
from megatron_llamapro.checkpoint.tensors.weight_map import hf_name_in_layer, iter_hf, weights_of
from megatron_llamapro.expansion.round import Init


class BlockState(Enum):
    """What has become of an added block."""

    IDENTITY = "identity, as when added"
    RANDOM = "identity by its zeros; of its other values only norms and shapes are proven: no seed of them was noted"
    TRAINED = "trained"
    WRONG = "wrong"


@dataclass(frozen=True)
class BlockReport:
    """An added block, judged."""

    layer: int
    state: BlockState
    text: str = ""
    """What is wrong, or tells that it was trained."""


@dataclass(frozen=True)
class _Beginning:
    """How a tensor of an added block began."""

    name: str
    is_zeroed: bool
    rows: tuple[Rows, ...]
    """What it may have been, by which casts came before and after; empty: drawn with a seed that nobody noted."""


@dataclass(frozen=True)
class AddedBlocks:
    """The blocks that `expanded` has and `original` has not; the lineage of both is known to agree."""

    original: Checkpoint
    expanded: Checkpoint
    files: SourceFiles
    hashes: Mapping[str, str]
    """Of every tensor of `expanded`."""
    progress: Progress = nothing

    @property
    def layers(self) -> list[int]:
        """Where they are. (Blocks that `original` has already may have been trained in it.)"""
        known = self.original.plan.num_rounds
        return [i for i, layer in enumerate(self.expanded.plan.layers) if layer.added_in_round > known]

    def judge(self, layer: int) -> BlockReport:
        """Judge one of them.

        Training moves what was zeroed first (its gradient is the only one that is not zero at step 0), so zeros there
        mean an untrained block, which must then have every bit that it began with. What a block of a later round than
        the first began with is computed from blocks as `expanded` has them.
        """
        parent, beginnings = self._parent(layer), list(self._beginnings(layer))
        moved = [beginning.name for beginning in beginnings if beginning.is_zeroed and not self._holds(beginning)]
        for name in moved:
            if not self._has_values(name):
                return BlockReport(layer, BlockState.WRONG, f"{name} holds -0.0, which is not the +0.0 it was given")
            if self.hashes[name] == self.hashes[hf_name_in_layer(name, parent)]:
                return BlockReport(layer, BlockState.WRONG, f"{name} is block {parent}'s, not zero")
        if moved:
            return BlockReport(layer, BlockState.TRAINED, f"{moved[0]} is not zero")
        for beginning in beginnings:
            if not self._holds(beginning):
                return BlockReport(layer, BlockState.WRONG, self._problem(layer, beginning.name, parent))
        is_random = any(not beginning.rows for beginning in beginnings)
        return BlockReport(layer, BlockState.RANDOM if is_random else BlockState.IDENTITY)

    def _problem(self, layer: int, name: str, parent: int) -> str:
        text = f"{name} is not what init {self._init(layer).value} makes of block {parent}"
        if self._is_next_round(layer) or self._init(layer) is Init.RANDOM:
            return text
        return f"{text} as it is now: compare with the model that round {self._round(layer)} expanded"

    def _round(self, layer: int) -> int:
        return self.expanded.plan.layers[layer].added_in_round

    def _is_next_round(self, layer: int) -> bool:
        return self._round(layer) == self.original.plan.num_rounds + 1

    def _init(self, layer: int) -> Init:
        assert self.expanded.manifest is not None
        return Init(self.expanded.manifest.inits[self._round(layer) - 1])

    def _seed(self, layer: int) -> int | None:
        assert self.expanded.manifest is not None
        return self.expanded.manifest.init_seeds[self._round(layer) - 1]

    def _parent(self, layer: int) -> int:
        """Where the block that it was made of stands now."""
        plan, number = self.expanded.plan, self._round(layer)
        then = plan.after(number).layers[plan.layers_after(number).index(layer)]
        return plan.layers_after(number - 1)[then.parent_layer]

    def _beginnings(self, layer: int) -> Iterator[_Beginning]:
        plan, number, init, seed = self.expanded.plan, self._round(layer), self._init(layer), self._seed(layer)
        before = self.original if self._is_next_round(layer) else after_rounds(self.expanded, number - 1)
        there = plan.layers_after(number)
        weights = weights_of(self.expanded.shape.with_layers(there))
        origins = {
            types: Origins(before, self.files, plan.after(number), types[0], init, seed or 0)
            for types in self._ways(before.dtype)
        }
        for weight, name, _ in iter_hf([weight for weight in weights if weight.layer == there.index(layer)]):
            rows = {types: origin.rows(weight, name) for types, origin in origins.items()}
            yield _Beginning(
                hf_name_in_layer(name, layer),
                is_zeroed(weight, name, init),
                tuple(
                    cast_along(made, types=types, name=name)
                    for types, made in rows.items()
                    if seed is not None or not isinstance(made, NormalRows)
                ),
            )

    def _ways(self, before: str) -> list[tuple[str, ...]]:
        """The type that a block of a model of type `before` may have been made in, and those it was cast to since: the
        manifest's type is one that the model once had."""
        assert self.expanded.manifest is not None
        now, noted_in = self.expanded.dtype, self.expanded.manifest.hash_dtype
        ways = [(now,), (before, now), (noted_in, now), (before, noted_in, now)]
        return [tuple(dtype for dtype, _ in groupby(way)) for way in ways]

    def _holds(self, beginning: _Beginning) -> bool:
        """Whether a tensor is what it began as, as far as that is known."""
        if not beginning.rows:
            return True
        tensor, itemsize = self.expanded.tensors[beginning.name], self.expanded.itemsize
        hashes = (hash_rows(rows, tensor, itemsize, progress=self.progress) for rows in beginning.rows)
        return self.hashes[beginning.name] in hashes

    def _has_values(self, name: str) -> bool:
        """Whether a tensor holds anything but +0.0 and -0.0, by its bits."""
        tensor, itemsize = self.expanded.tensors[name], self.expanded.itemsize
        unsigned = numpy.dtype(f"u{itemsize}")
        magnitude = numpy.array((1 << (8 * itemsize - 1)) - 1, unsigned)
        found = [False]

        def look(start: int, rows: numpy.ndarray) -> None:
            found[0] |= bool((rows.view(unsigned) & magnitude).any())

        hash_rows(rows_of(self.expanded, name, self.files), tensor, itemsize, each=look)
        return found[0]
