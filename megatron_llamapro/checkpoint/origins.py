"""Where the rows of a target's tensors come from: the source's own, cast or not, and those of blocks that it adds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_llamapro.checkpoint.adapters import rows_of
from megatron_llamapro.checkpoint.casting import MeanRows, NormalRows, OneRows, ZeroRows
from megatron_llamapro.checkpoint.opened import Checkpoint
from megatron_llamapro.checkpoint.streaming import Rows, SourceFiles
from megatron_llamapro.checkpoint.weight_map import Weight, hf_name_in_layer, is_block_norm, is_norm
from megatron_llamapro.expansion.inits import Init
from megatron_llamapro.expansion.plan import ExpansionPlan, Layer
from megatron_llamapro.model.hf_fields import number


def is_zeroed(weight: Weight, name: str, init: Init) -> bool:
    """Whether an added block begins with zeros in its tensor `name`, a part of `weight`."""
    return is_block_norm(name) if init.zeroes_norms else weight.row.zero_in_added


@dataclass(frozen=True)
class Origins:
    """The tensors of `source`, or of its next round of expansion, in `dtype`."""

    source: Checkpoint
    files: SourceFiles
    plan: ExpansionPlan
    dtype: str
    init: Init = Init.COPY
    seed: int = 0

    def rows(self, weight: Weight, name: str) -> Rows:
        """Rows of the target's tensor `name`, a part of `weight`."""
        if weight.layer is None or self.plan.num_rounds == self.source.plan.num_rounds:
            return self._own(name)
        layer = self.plan.layers[weight.layer]
        if layer.added_in_round < self.plan.num_rounds:
            return self._own(hf_name_in_layer(name, layer.parent_layer))
        if is_zeroed(weight, name, self.init):
            return ZeroRows()
        return _BEGINNINGS[self.init](self, layer, name)

    def _own(self, name: str) -> Rows:
        """The source's tensor."""
        return rows_of(self.source, name, self.files, dtype=self.dtype)

    def _copy(self, layer: Layer, name: str) -> Rows:
        return self._own(hf_name_in_layer(name, layer.parent_layer))

    def _mean(self, layer: Layer, name: str) -> Rows:
        last = self.source.plan.num_layers - 1
        neighbours = sorted({layer.parent_layer, min(layer.parent_layer + 1, last)})
        rows = [self._own(hf_name_in_layer(name, neighbour)) for neighbour in neighbours]
        return MeanRows(*rows, dtype=self.dtype) if len(rows) == 2 else rows[0]

    def _random(self, layer: Layer, name: str) -> Rows:
        if is_norm(name):
            return OneRows(dtype=self.dtype)
        if name.endswith(".bias"):
            return ZeroRows()
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8], "little")
        std = number(self.source.config, "initializer_range", default=0.02)
        return NormalRows(seed=seed, std=std, dtype=self.dtype)


_BEGINNINGS: dict[Init, Callable[[Origins, Layer, str], Rows]] = {
    Init.COPY: Origins._copy,
    Init.RANDOM: Origins._random,
    Init.MEAN: Origins._mean,
    Init.ZERO_NORM: Origins._copy,
}
