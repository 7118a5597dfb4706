"""Judges the blocks that an expansion added: still an identity, trained, or wrong.

The initial values of a block are computed again as the conversion computes them (`Origins`), a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import numpy

from megatron_llamapro.checkpoint.dial import output_projections
from megatron_llamapro.checkpoint.formats.adapters import rows_of
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.lineage import Origins, after_rounds, is_zeroed
from megatron_llamapro.checkpoint.tensors.computed import NormalRows, ZeroRows, cast_along
from megatron_llamapro.checkpoint.tensors.streaming import Progress, Rows, SourceFiles, hash_rows, nothing
from megatron_llamapro.checkpoint.tensors.weight_map import hf_name_in_layer, iter_hf, weights_of
from megatron_llamapro.expansion.round import Init


class BlockState(Enum):
    """The state of an added block."""

    IDENTITY = "identity, as when added"
    RANDOM = "identity by its zeros; of its other values only norms and shapes are proven: their seed was not recorded"
    OFF = "identity, dialed to 0"
    TRAINED = "trained"
    WRONG = "wrong"


@dataclass(frozen=True)
class BlockReport:
    """The verdict on an added block."""

    layer: int
    state: BlockState
    text: str = ""
    """The fault, or the evidence that it was trained."""


@dataclass(frozen=True)
class _InitialTensor:
    """The initial values of a tensor of an added block."""

    name: str
    is_zeroed: bool
    rows: tuple[Rows, ...]
    """The possible values, for different casts before and after. Empty if drawn with a seed that was not recorded."""


@dataclass(frozen=True)
class AddedBlocks:
    """The blocks of `expanded` that `original` does not have. The lineage of both must agree."""

    original: Checkpoint
    expanded: Checkpoint
    files: SourceFiles
    hashes: Mapping[str, str]
    """Hash of every tensor of `expanded`."""
    progress: Progress = nothing

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks in `expanded`. (Added blocks that `original` already has may be trained in it.)"""
        known = self.original.plan.num_rounds
        return [i for i, layer in enumerate(self.expanded.plan.layers) if layer.added_in_round > known]

    def judge(self, layer: int) -> BlockReport:
        """Judge one block.

        Training first moves the zeroed weights: at step 0 only their gradients are not zero. If they are still zero,
        the block is untrained and must have all of its initial bits. If more than one round was added to `original`,
        the initial values of the later rounds are computed from the blocks that `expanded` has now. A block that the
        manifest says was dialed to 0 needs only the zeros.
        """
        if self._is_off(layer):
            return BlockReport(layer, BlockState.OFF, "it was trained, then dialed to 0")
        parent, initials = self._parent(layer), list(self._initial_tensors(layer))
        moved = [initial.name for initial in initials if initial.is_zeroed and not self._holds(initial)]
        for name in moved:
            if not self._has_values(name):
                return BlockReport(layer, BlockState.WRONG, f"{name} holds -0.0, but was initialised to +0.0")
            if self.hashes[name] == self.hashes[hf_name_in_layer(name, parent)]:
                return BlockReport(layer, BlockState.WRONG, f"{name} is block {parent}'s, not zero")
        if moved:
            return BlockReport(layer, BlockState.TRAINED, f"{moved[0]} is not zero")
        for initial in initials:
            if not self._holds(initial):
                return BlockReport(layer, BlockState.WRONG, self._problem(layer, initial.name, parent))
        is_random = any(not initial.rows for initial in initials)
        return BlockReport(layer, BlockState.RANDOM if is_random else BlockState.IDENTITY)

    def _is_off(self, layer: int) -> bool:
        assert self.expanded.manifest is not None
        dial, index = self.expanded.manifest.dial, self.expanded.plan.added_layers.index(layer)
        if dial is None or not dial.is_off(index):
            return False
        outputs = [
            name
            for name, block in output_projections(self.expanded.shape, self.expanded.plan).items()
            if block == index
        ]
        tensors, itemsize = self.expanded.tensors, self.expanded.itemsize
        return all(self.hashes[name] == hash_rows(ZeroRows(), tensors[name], itemsize) for name in outputs)

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
        """Return the current index of the block that it was made of."""
        return self.expanded.plan.copied_from(layer)

    def _initial_tensors(self, layer: int) -> Iterator[_InitialTensor]:
        plan, number, init, seed = self.expanded.plan, self._round(layer), self._init(layer), self._seed(layer)
        earlier = 0 if number in plan.apart else number - 1
        before = self.original if self.original.plan.num_rounds == earlier else after_rounds(self.expanded, earlier)
        there = plan.layers_of_round(number)
        weights = weights_of(self.expanded.shape.with_layers(there))
        origins = {
            types: Origins(before, self.files, plan.of_round(number), types[0], init, seed or 0)
            for types in self._ways(before.dtype)
        }
        for weight, name, _ in iter_hf([weight for weight in weights if weight.layer == there.index(layer)]):
            rows = {types: origin.rows(weight, name) for types, origin in origins.items()}
            yield _InitialTensor(
                hf_name_in_layer(name, layer),
                is_zeroed(weight, name, init),
                tuple(
                    cast_along(made, types=types, name=name)
                    for types, made in rows.items()
                    if seed is not None or not isinstance(made, NormalRows)
                ),
            )

    def _ways(self, before: str) -> list[tuple[str, ...]]:
        """Return the sequences of types that a block may have had since it was added to a model of type `before`.

        The manifest's type is one that the model once had.
        """
        assert self.expanded.manifest is not None
        now, noted_in = self.expanded.dtype, self.expanded.manifest.hash_dtype
        ways = [(now,), (before, now), (noted_in, now), (before, noted_in, now)]
        return [tuple(dtype for dtype, _ in groupby(way)) for way in ways]

    def _holds(self, initial: _InitialTensor) -> bool:
        """Return whether a tensor has its initial values, or whether those are unknown."""
        if not initial.rows:
            return True
        tensor, itemsize = self.expanded.tensors[initial.name], self.expanded.itemsize
        hashes = (hash_rows(rows, tensor, itemsize, progress=self.progress) for rows in initial.rows)
        return self.hashes[initial.name] in hashes

    def _has_values(self, name: str) -> bool:
        """Return whether a tensor has any bits other than those of +0.0 and -0.0."""
        tensor, itemsize = self.expanded.tensors[name], self.expanded.itemsize
        unsigned = numpy.dtype(f"u{itemsize}")
        magnitude = numpy.array((1 << (8 * itemsize - 1)) - 1, unsigned)
        found = [False]

        def look(start: int, rows: numpy.ndarray) -> None:
            found[0] |= bool((rows.view(unsigned) & magnitude).any())

        hash_rows(rows_of(self.expanded, name, self.files), tensor, itemsize, each=look)
        return found[0]
