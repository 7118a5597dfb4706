"""Where a checkpoint comes from: the manifest of what a conversion makes, and which tensor was which before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from megatron_llamapro.checkpoint.manifest import Manifest, Source, config_sha256, tool_versions
from megatron_llamapro.checkpoint.opened import Checkpoint
from megatron_llamapro.checkpoint.weight_map import hf_name_in_layer, hf_shapes, layer_of
from megatron_llamapro.expansion.inits import Expansion, Init
from megatron_llamapro.expansion.plan import ExpansionPlan


def original_name(name: str, plan: ExpansionPlan) -> str | None:
    """The name that a tensor had in the first source model; None for a tensor of an added block."""
    index = layer_of(name)
    if index is None:
        return name
    layer = plan.layers[index]
    return None if layer.is_added else hf_name_in_layer(name, layer.source_layer)


def name_now(name: str, plan: ExpansionPlan, num_rounds: int) -> str:
    """The name, in the model of `plan`, of the tensor that had `name` after so many of its rounds."""
    layer = layer_of(name)
    return name if layer is None else hf_name_in_layer(name, plan.layers_after(num_rounds)[layer])


def after_rounds(checkpoint: Checkpoint, num_rounds: int) -> Checkpoint:
    """The part of an expanded checkpoint that was there after so many rounds, under the names of then."""
    known, plan = checkpoint.manifest, checkpoint.plan
    shape = checkpoint.shape.with_layers(plan.layers_after(num_rounds))
    names = {name: name_now(name, plan, num_rounds) for name in hf_shapes(shape)}
    adapters = checkpoint.adapters
    manifest = known and dataclasses.replace(
        known,
        plan=plan.after(num_rounds),
        inits=known.inits[:num_rounds],
        init_seeds=known.init_seeds[:num_rounds],
    )
    return dataclasses.replace(
        checkpoint,
        shape=shape,
        manifest=manifest,
        tensors={name: checkpoint.tensors[now] for name, now in names.items()},
        adapters={name: adapters[now] for name, now in names.items() if now in adapters},
    )


def target_manifest(
    source: Checkpoint, plan: ExpansionPlan, *, dtype: str, expansion: Expansion, hashes: Mapping[str, str]
) -> Manifest:
    """The manifest of what was made of `source`, by `expansion` where `plan` has a round more; its tensors have
    `hashes`.

    What an expanded source's manifest says of the original tensors is kept, not made anew from tensors that may have
    been trained or cast since; a source that was never expanded is its own original.
    """
    known, is_new_round = source.manifest, plan.num_rounds > source.plan.num_rounds
    if known and not is_new_round and known.dtype == dtype:
        return known
    rounds = {"inits": known.inits if known else (), "init_seeds": known.init_seeds if known else ()}
    if is_new_round:
        seed = expansion.seed if expansion.init is Init.RANDOM else None
        rounds = {"inits": (*rounds["inits"], expansion.init.value), "init_seeds": (*rounds["init_seeds"], seed)}
    if known and known.plan.num_rounds:
        return dataclasses.replace(known.stored_as(dtype), plan=plan, tool_versions=tool_versions(), **rounds)
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


def check_base(source: Checkpoint, hash_of: Callable[[str], str]) -> None:
    """Raise `CheckpointError` where a tensor that a delta checkpoint takes from its base, and whose hash is `hash_of`
    its name, is another than the one that was trained with."""
    if source.base is not None:
        source.base.check({name: hash_of(name) for name in source.base.delta.base_hashes})


def _source_of(source: Checkpoint) -> Source:
    return Source(
        name=source.folder.resolve().name, config_sha256=config_sha256(source.config), weight_bytes=source.weight_bytes
    )
