"""The dial: a trained checkpoint moved back towards its original, W0 + scale * (W1 - W0), without training.

- Of added blocks, the output projections are multiplied by the scale. Their other tensors stay.
- Of original tensors that were trained, and of their low-rank adapters, the change is multiplied by the scale.

At 0 the model computes what the original does, bit for bit. At 1 it is the checkpoint itself. Every reader of a dialed
checkpoint sees dialed weights (`formats.adapters.rows_of`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.before_training import OriginalsFinder
from megatron_llamapro.checkpoint.formats.adapters import undialed_hash
from megatron_llamapro.checkpoint.formats.checkpoint import Adapter, Checkpoint, DialedTensor, OriginalTensor
from megatron_llamapro.checkpoint.lineage import original_name
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles
from megatron_llamapro.checkpoint.tensors.transfer import default_workers
from megatron_llamapro.checkpoint.tensors.weight_map import weights_of
from megatron_llamapro.config.errors import CheckpointError, ConfigError
from megatron_llamapro.expansion.dial_record import BlockScale, DialRecord, block_scale, scale_of_block
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.shape import ModelShape


@dataclass(frozen=True)
class DialSetting:
    """What a conversion does with the dial."""

    scale: float | Sequence[float]
    """One number from 0 to 2, or one for each added block."""
    original: str | Path | None = None
    """The folder of the model before training, in any format. See `dialed`."""


def dialed(checkpoint: Checkpoint, scale: float | Sequence[float], *, original: Checkpoint | None = None) -> Checkpoint:
    """Return the opened checkpoint with its dial at `scale`: one number from 0 to 2, or one for each added block.

    `original` is the model before training, in any format. It is needed if original tensors were trained, unless the
    run's base still holds them. For several scales, use `Dial.of(checkpoint).at(scale)`, which reads tensors only once.

    Raises:
        ConfigError: a scale is out of range; there are too few or too many; or there is one for each block, but the run
            trained other parts too.
        CheckpointError: nothing was trained; `original` is needed and missing; or it is another model.
    """
    block_scale(scale, num_added_blocks=len(checkpoint.plan.added_layers))
    return Dial.of(checkpoint, original=original).at(scale)


@dataclass(frozen=True)
class Dial:
    """The dial of an opened checkpoint: what it moves, and where it moves to."""

    checkpoint: Checkpoint
    manifest: Manifest
    outputs: Mapping[str, int]
    """The output projections of added blocks, each with the index of its block among the added ones."""
    trained: Mapping[str, OriginalTensor]
    """The original tensors that were trained, as they were before. Their names are those in the checkpoint."""
    undialed_hashes: Mapping[str, str]
    """`undialed_hash` of every tensor that the dial can move."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, original: Checkpoint | None = None) -> Dial:
        """Find what was trained: hash the tensors of the checkpoint that may have been. Raises what `dialed` raises."""
        manifest = checkpoint.manifest
        if checkpoint.other_dtypes:
            raise CheckpointError(f"{checkpoint.folder} mixes types: convert it with --dtype, then dial the result")
        if manifest is None:
            raise CheckpointError(
                f"{checkpoint.folder} has no llamapro.json, so nothing says what was trained: give the folder of a run "
                "or its export (an original model has nothing to dial)"
            )
        outputs = output_projections(checkpoint.shape, checkpoint.plan)
        originals = [name for name in checkpoint.tensors if original_name(name, checkpoint.plan) is not None]
        with (
            SourceFiles({**checkpoint.states, **(original.states if original else {})}) as files,
            ThreadPoolExecutor(default_workers()) as pool,
        ):
            finder = OriginalsFinder(checkpoint, manifest, files, pool)
            before = finder.before(originals, original)
            adapted = [name for name in originals if name in checkpoint.adapters]
            if not (outputs or before.tensors or adapted):
                raise CheckpointError(
                    f"{checkpoint.folder} has no added blocks, no adapters and no trained weights: there is nothing to "
                    "dial"
                )
            movable = {*outputs, *before.tensors, *adapted}
            moved = [name for name in checkpoint.tensors if name in movable]
            hashes = finder.hashes(moved, lambda name: undialed_hash(checkpoint, name, files))
        states = {**checkpoint.states, **before.states}
        return cls(dataclasses.replace(checkpoint, states=states), manifest, outputs, before.tensors, hashes)

    def at(self, scale: float | Sequence[float]) -> Checkpoint:
        """Return the checkpoint dialed to `scale`, with the record in its manifest; at 1, the checkpoint itself.

        Raises:
            ConfigError: the scales are out of range, or do not match the blocks.
        """
        plan = self.checkpoint.plan
        chosen = block_scale(scale, num_added_blocks=len(plan.added_layers))
        others = [name for name in self.undialed_hashes if name not in self.outputs]
        if others and isinstance(scale, Sequence) and len(scale) > 1:
            raise ConfigError(
                f"added_block_scale has one value for each block, but original weights were trained too, such as "
                f"{others[0]}: give one value for all"
            )
        if chosen == 1:
            return self.checkpoint
        scales = {name: scale_of_block(chosen, self.outputs.get(name, 0)) for name in self.undialed_hashes}
        moved = {name: value for name, value in scales.items() if value != 1}
        return dataclasses.replace(
            self.checkpoint,
            manifest=dataclasses.replace(self.manifest, dial=self._record(chosen, moved)),
            adapters=self._adapters(moved),
            dialed={
                name: DialedTensor(value, self.trained.get(name))
                for name, value in moved.items()
                if name in self.outputs or name in self.trained
            },
        )

    def _record(self, scale: BlockScale, moved: Collection[str]) -> DialRecord:
        before = self.manifest.dial
        earlier = (*before.earlier, before.added_block_scale) if before else ()
        return DialRecord(scale, {name: self.undialed_hashes[name] for name in moved}, earlier)

    def _adapters(self, moved: Mapping[str, float]) -> dict[str, Adapter]:
        """Return the adapters. Those of original weights that were not trained are scaled, and left out at 0. (A
        trained weight, or an output projection, is dialed after the merge.)"""
        kept = {}
        for name, adapter in self.checkpoint.adapters.items():
            scaled = name in moved and name not in self.outputs and name not in self.trained
            factor = moved[name] if scaled else 1.0
            if factor:
                kept[name] = dataclasses.replace(adapter, scaling=adapter.scaling * factor)
        return kept


def output_projections(shape: ModelShape, plan: ExpansionPlan) -> dict[str, int]:
    """Return the output projections of added blocks, each with the index of its block among the added ones."""
    place = {layer: index for index, layer in enumerate(plan.added_layers)}
    return {
        name: place[weight.layer]
        for weight in weights_of(shape)
        if weight.layer in place and weight.row.zero_in_added
        for name in weight.hf_names
    }
