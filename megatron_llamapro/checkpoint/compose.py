"""Puts packs of added blocks into the model that their runs started from.

Every pack becomes a round of the result's plan. A block follows the same original block as in its run; where two packs
have blocks behind the same one, they are in the order in which the packs are given. The result is an opened
checkpoint whose tensors lie in the folders of the base and of the packs, and the converter writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_llamapro.checkpoint.convert import TargetKind, hugging_face, write_checkpoint
from megatron_llamapro.checkpoint.dial import output_projections
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint, DialedTensor
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.hashes import tensor_hashes
from megatron_llamapro.checkpoint.lineage import name_now
from megatron_llamapro.checkpoint.pack import Pack, open_pack
from megatron_llamapro.checkpoint.report import Conversion
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, stored_hash
from megatron_llamapro.checkpoint.tensors.weight_map import hf_name_in_layer, hf_shapes, layer_of
from megatron_llamapro.checkpoint.writing import DEFAULTS, Options, folders_of
from megatron_llamapro.config.drafts import check_target
from megatron_llamapro.config.errors import CheckpointError, ConfigError
from megatron_llamapro.expansion.dial_record import LARGEST_SCALE, DialRecord, block_scale
from megatron_llamapro.expansion.manifest import Manifest, tool_versions
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.provenance import ComposedPack
from megatron_llamapro.expansion.round import expanded_hf_config
from megatron_llamapro.families.hf_config import ITEMSIZES, model_shape


@dataclass(frozen=True)
class ScaledPack:
    """A pack to put into a model."""

    folder: str | Path
    scale: float = 1.0
    """Factor of its output projections, from 0 (they are +0.0) through 1 (their own bits) to 2."""


def compose(
    base: str | Path,
    target: str | Path,
    *,
    packs: Sequence[ScaledPack] = (),
    kind: TargetKind | None = None,
    options: Options = DEFAULTS,
) -> Conversion:
    """Write the model `base`, in any format, with the blocks of all packs (default: to Hugging Face).

    Without packs, the result is the base. With one pack at scale 1, it is the export of the pack's run.

    Raises:
        CheckpointError: the base or a pack cannot be read; a pack belongs to another base, is damaged or is given
            twice; the packs have different types; or the target cannot be written.
        ConfigError: a scale is out of range.
    """
    checkpoint, kind = open_checkpoint(Path(base)), kind or hugging_face()
    _check_base(checkpoint)
    for each in packs:
        if not 0 <= each.scale <= LARGEST_SCALE:
            raise ConfigError(
                f"the scale of {each.folder} is {each.scale:g}: it must be from 0 (as without the pack) through 1 (as "
                f"trained) to {LARGEST_SCALE:g}"
            )
    if not packs:
        return write_checkpoint(checkpoint, Path(target), kind, options=options)
    opened = [open_pack(Path(each.folder)) for each in packs]
    _check_fit(checkpoint, opened)
    check_target(Path(target), overwrite=options.overwrite, sources=folders_of(checkpoint, *opened))
    _check_hashes(checkpoint, opened, options)
    composed = _composed(checkpoint, opened, [each.scale for each in packs])
    done = write_checkpoint(composed, Path(target), kind, dtype=composed.dtype, options=options)
    return dataclasses.replace(done, num_source_layers=checkpoint.shape.num_layers)


def _check_base(base: Checkpoint) -> None:
    if base.plan.num_rounds or base.adapters:
        what = "added blocks" if base.plan.num_rounds else "low-rank adapters"
        raise CheckpointError(f"{base.folder} has {what}: give the model that the packs' runs were expanded from")


def _check_fit(base: Checkpoint, packs: Sequence[Pack]) -> None:
    """Raise `CheckpointError` if a pack does not fit the base or another pack, as far as headers and records show."""
    for pack in packs:
        if (pack.manifest.family, pack.base_shape) != (base.config["model_type"], base.shape):
            fields = [field.name for field in dataclasses.fields(base.shape)]
            differing = [name for name in fields if getattr(pack.base_shape, name) != getattr(base.shape, name)]
            raise CheckpointError(
                f"{base.folder} is not the base of the pack {pack.folder}: its config.json differs in "
                f"{', '.join(differing) or 'model_type'}"
            )
        types = {base.dtype, *base.other_dtypes.values()}
        noted_in = pack.manifest.hash_dtype
        if types != {noted_in} and noted_in not in (pack.manifest.dtype, "float32"):
            raise CheckpointError(
                f"{base.folder} is {' and '.join(sorted(types))}, but the run of {pack.folder} had its weights cast to "
                f"{noted_in}: give the {noted_in} model (llamapro convert hf-to-hf --dtype {noted_in})"
            )
    by_hash: dict[str, Pack] = {}
    for pack in packs:
        other = by_hash.setdefault(pack.record.hash, pack)
        if other is not pack:
            raise CheckpointError(f"{other.folder} and {pack.folder} are the same pack: give each pack once")
        if pack.manifest.dtype != packs[0].manifest.dtype:
            raise CheckpointError(
                f"{packs[0].folder} is {packs[0].manifest.dtype}, but {pack.folder} is {pack.manifest.dtype}: extract "
                "both from checkpoints of one type (llamapro convert … --dtype)"
            )


def _check_hashes(base: Checkpoint, packs: Sequence[Pack], options: Options) -> None:
    """Raise `CheckpointError` if a tensor of the base or of a pack does not have the hash that a pack has noted."""
    types = sorted({pack.manifest.hash_dtype for pack in packs})
    options.on_total(base.weight_bytes * len(types))
    states = {path: state for each in (base, *packs) for path, state in each.states.items()}
    with SourceFiles(states) as files, ThreadPoolExecutor(options.workers) as pool:
        originals = {
            dtype: tensor_hashes(base, base.tensors, files, pool, types=(dtype,), progress=options.progress)
            for dtype in types
        }
        for pack in packs:
            for name, value in originals[pack.manifest.hash_dtype].items():
                if pack.manifest.original_hashes.get(name) != value:
                    raise CheckpointError(
                        f"{base.folder} is not the base of the pack {pack.folder}: its {name} has another hash; give "
                        f"the model that the run was expanded from ({pack.manifest.source.name})"
                    )
            hash_of = partial(stored_hash, files=files, itemsize=ITEMSIZES[pack.manifest.dtype])
            for name, value in zip(pack.tensors, pool.map(hash_of, pack.tensors.values()), strict=True):
                if value != pack.record.block_hashes[name]:
                    raise CheckpointError(f"{pack.folder} is damaged: {name} has another hash; extract the pack again")


def _composed(base: Checkpoint, packs: Sequence[Pack], scales: Sequence[float]) -> Checkpoint:
    """Return the base with the blocks of all packs, as one opened checkpoint in the type of the packs."""
    plan, config = base.plan, base.config
    for pack in packs:
        plan = plan.with_pack(pack.plan)
        config = expanded_hf_config(config, plan)
    shape, dtype = model_shape(config), packs[0].manifest.dtype
    tensors = {name_now(name, plan, 0): tensor for name, tensor in base.tensors.items()}
    types = {name_now(name, plan, 0): base.dtype_of(name) for name in base.tensors}
    scale_of: dict[str, float] = {}
    undialed: dict[str, str] = {}
    outputs = output_projections(shape, plan)
    for number, (pack, scale) in enumerate(zip(packs, scales, strict=True), 1):
        for then, name in _names_now(pack, plan, number).items():
            tensors[name] = pack.tensors[then]
            if scale != 1 and name in outputs:
                scale_of[name], undialed[name] = scale, pack.record.block_hashes[then]
    by_round = dict(enumerate(scales, 1))
    by_block = [by_round[plan.layers[layer].added_in_round] for layer in plan.added_layers]
    dial = DialRecord(block_scale(by_block, num_added_blocks=len(by_block)), undialed) if undialed else None
    return dataclasses.replace(
        base,
        config=config,
        shape=shape,
        manifest=_manifest(plan, packs, scales, dial),
        dtype=dtype,
        tensors={name: tensors[name] for name in hf_shapes(shape)},
        states={path: state for each in (base, *packs) for path, state in each.states.items()},
        base=None,
        other_dtypes={name: stored for name, stored in types.items() if stored != dtype},
        dialed={name: DialedTensor(scale) for name, scale in scale_of.items()},
    )


def _names_now(pack: Pack, plan: ExpansionPlan, number: int) -> dict[str, str]:
    """Return, for every tensor of a pack, its name in the model of `plan`, whose round `number` the pack is."""
    layers = plan.layers_of_round(number)
    return {
        name: hf_name_in_layer(name, layers[layer]) for name in pack.tensors if (layer := layer_of(name)) is not None
    }


def _manifest(plan: ExpansionPlan, packs: Sequence[Pack], scales: Sequence[float], dial: DialRecord | None) -> Manifest:
    first, *others = [pack.manifest for pack in packs]
    return dataclasses.replace(
        first,
        plan=plan,
        inits=(*first.inits, *(init for each in others for init in each.inits)),
        init_seeds=(*first.init_seeds, *(seed for each in others for seed in each.init_seeds)),
        tool_versions=tool_versions(),
        averaged=() if others else first.averaged,
        dial=dial,
        packs=tuple(
            ComposedPack(number, pack.name, pack.record.hash, scale)
            for number, (pack, scale) in enumerate(zip(packs, scales, strict=True), 1)
        ),
    )
