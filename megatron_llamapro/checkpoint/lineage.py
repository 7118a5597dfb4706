"""The lineage of a checkpoint: its manifest, the earlier names of its tensors, and the source of each tensor's rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_llamapro.checkpoint.formats.adapters import rows_of
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.tensors.computed import MeanRows, NormalRows, OneRows, ZeroRows
from megatron_llamapro.checkpoint.tensors.streaming import Rows, SourceFiles
from megatron_llamapro.checkpoint.tensors.weight_map import (
    Weight,
    hf_name_in_layer,
    hf_shapes,
    is_block_norm,
    is_norm,
    layer_of,
)
from megatron_llamapro.expansion.manifest import Manifest, Source, config_sha256, tool_versions
from megatron_llamapro.expansion.plan import ExpansionPlan, Layer
from megatron_llamapro.expansion.round import Expansion, Init
from megatron_llamapro.families.fields import number


def original_name(name: str, plan: ExpansionPlan) -> str | None:
    """Return a tensor's name in the first source model, or None if the tensor is in an added block."""
    index = layer_of(name)
    if index is None:
        return name
    layer = plan.layers[index]
    return None if layer.is_added else hf_name_in_layer(name, layer.source_layer)


def name_now(name: str, plan: ExpansionPlan, num_rounds: int) -> str:
    """Return the name, in the model of `plan`, of the tensor that was called `name` after `num_rounds` rounds."""
    layer = layer_of(name)
    return name if layer is None else hf_name_in_layer(name, plan.layers_after(num_rounds)[layer])


def after_rounds(checkpoint: Checkpoint, num_rounds: int) -> Checkpoint:
    """Return the part of an expanded checkpoint that existed after `num_rounds` rounds, under its names then."""
    known, plan = checkpoint.manifest, checkpoint.plan
    shape = checkpoint.shape.with_layers(plan.layers_after(num_rounds))
    names = {name: name_now(name, plan, num_rounds) for name in hf_shapes(shape)}
    adapters = checkpoint.adapters
    manifest = known and dataclasses.replace(
        known,
        plan=plan.after(num_rounds),
        dial=None,
        inits=known.inits[:num_rounds],
        init_seeds=known.init_seeds[:num_rounds],
        packs=tuple(pack for pack in known.packs if pack.round <= num_rounds),
    )
    return dataclasses.replace(
        checkpoint,
        shape=shape,
        manifest=manifest,
        tensors={name: checkpoint.tensors[now] for name, now in names.items()},
        adapters={name: adapters[now] for name, now in names.items() if now in adapters},
        dialed={name: checkpoint.dialed[now] for name, now in names.items() if now in checkpoint.dialed},
    )


def target_manifest(
    source: Checkpoint, plan: ExpansionPlan, *, dtype: str, expansion: Expansion | None, hashes: Mapping[str, str]
) -> Manifest:
    """Return the manifest of a model that was made of `source`, with another round if there is an `expansion`.

    `hashes` are those of the model's tensors. If the source was expanded before, its manifest's facts about the
    original tensors are kept: the tensors may have been trained or cast since. So they are if it was dialed. Any other
    source that was never expanded is its own original.
    """
    known = source.manifest
    if known and expansion is None and known.dtype == dtype:
        return known
    rounds = {"inits": known.inits if known else (), "init_seeds": known.init_seeds if known else ()}
    if expansion is not None:
        seed = expansion.seed if expansion.init is Init.RANDOM else None
        rounds = {"inits": (*rounds["inits"], expansion.init.value), "init_seeds": (*rounds["init_seeds"], seed)}
    dial = known.dial if known and expansion is None else None
    if known and (known.plan.num_rounds or dial):
        since = {"tool_versions": tool_versions(), "dial": dial, **rounds}
        return dataclasses.replace(known.stored_as(dtype), plan=plan, **since)
    names = {name: original_name(name, plan) for name in hashes}
    return Manifest(
        family=source.config["model_type"],
        dtype=dtype,
        plan=plan,
        **rounds,
        source=_source_of(source),
        original_hashes={first: hashes[name] for name, first in names.items() if first is not None},
        tool_versions=tool_versions(),
    )


def check_base_tensors(source: Checkpoint, hash_of: Callable[[str], str]) -> None:
    """Raise `CheckpointError` if a tensor in the base of a delta checkpoint is not the one that the run trained with.
    `hash_of` returns the hash of the tensor with a given name."""
    if source.base is not None:
        source.base.check({name: hash_of(name) for name in source.base.delta.base_hashes})


def _source_of(source: Checkpoint) -> Source:
    return Source(
        name=source.folder.resolve().name, config_sha256=config_sha256(source.config), weight_bytes=source.weight_bytes
    )


def is_zeroed(weight: Weight, name: str, init: Init) -> bool:
    """Return whether an added block starts with zeros in its tensor `name`, a part of `weight`."""
    return is_block_norm(name) if init.zeroes_norms else weight.row.zero_in_added


@dataclass(frozen=True)
class Origins:
    """The source of a target's tensors: those of `source`, or of its next round of expansion, in `dtype`."""

    source: Checkpoint
    files: SourceFiles
    plan: ExpansionPlan
    dtype: str
    init: Init = Init.COPY
    seed: int = 0

    def rows(self, weight: Weight, name: str) -> Rows:
        """Return the rows of the target's tensor `name`, a part of `weight`."""
        if weight.layer is None or self.plan.num_rounds == self.source.plan.num_rounds:
            return self._own(name)
        layer = self.plan.layers[weight.layer]
        if layer.added_in_round < self.plan.num_rounds:
            return self._own(hf_name_in_layer(name, layer.parent_layer))
        if is_zeroed(weight, name, self.init):
            return ZeroRows()
        return _INITIAL_ROWS[self.init](self, layer, name)

    def _own(self, name: str) -> Rows:
        """Return the rows of the source's tensor `name`."""
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


_INITIAL_ROWS: dict[Init, Callable[[Origins, Layer, str], Rows]] = {
    Init.COPY: Origins._copy,
    Init.RANDOM: Origins._random,
    Init.MEAN: Origins._mean,
    Init.ZERO_NORM: Origins._copy,
}
