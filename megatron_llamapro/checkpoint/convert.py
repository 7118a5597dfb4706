"""Conversions from any format to any other, with blocks added on the way. Only computed values need torch, e.g. casts.

Tensors are streamed: a worker needs a few megabytes, whatever the model's size. The result is read back and compared
before it takes the target's place. An interrupted conversion can resume.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_llamapro.checkpoint.dial import DialSetting, dialed
from megatron_llamapro.checkpoint.formats.adapters import unmerged_hash
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint, Format
from megatron_llamapro.checkpoint.formats.hf_reader import check_stored_head, open_hf
from megatron_llamapro.checkpoint.formats.hf_writer import config_text, hf_layout
from megatron_llamapro.checkpoint.formats.legacy_grid import LayerSpec
from megatron_llamapro.checkpoint.formats.legacy_writer import LegacyTarget, legacy_layout
from megatron_llamapro.checkpoint.formats.open import open_checkpoint, open_megatron_checkpoint
from megatron_llamapro.checkpoint.formats.torch_dist import torch_dist_layout
from megatron_llamapro.checkpoint.lineage import Origins, check_base_tensors, name_now, target_manifest
from megatron_llamapro.checkpoint.report import Conversion
from megatron_llamapro.checkpoint.side_files import copy_side_files, notices_left_out, without_code
from megatron_llamapro.checkpoint.tensors.layout import DEFAULT_MAX_SHARD_BYTES, TargetLayout
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, stored_hash
from megatron_llamapro.checkpoint.tensors.transfer import TensorJob, transfer
from megatron_llamapro.checkpoint.tensors.weight_map import iter_hf, weights_of
from megatron_llamapro.checkpoint.writing import DEFAULTS, JOURNAL, Options, check_space, folders_of, open_journal
from megatron_llamapro.config.drafts import draft_of, staged
from megatron_llamapro.config.errors import CheckpointError, ExpansionError
from megatron_llamapro.config.version import VERSION
from megatron_llamapro.expansion.dial_record import block_scale
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.round import Expansion, Init, expanded_hf_config
from megatron_llamapro.families.hf_config import CONFIG_NAME, ITEMSIZES, MANIFEST_KEY, model_shape, spelled_for_all
from megatron_llamapro.families.shape import ModelShape


@dataclass(frozen=True)
class TargetKind:
    """A format to write."""

    layout: Callable[[Path, ModelShape, str], TargetLayout]
    """Makes the layout, given the folder to write into, the model's shape and its type."""
    manifest_in_config: bool = False
    """Whether config.json also holds the manifest, as in an export to Hugging Face."""


TORCH_DIST = TargetKind(torch_dist_layout)
"""Stores whole tensors. Any division of ranks can load it."""


def legacy(**division: Any) -> TargetKind:
    """Return the kind with `mp_rank_…` files for one division of ranks. `division` are fields of `LegacyTarget`."""
    if "layer_spec" in division:
        division["layer_spec"] = LayerSpec(division["layer_spec"])
    return TargetKind(partial(legacy_layout, target=LegacyTarget(**division)))


def hugging_face(max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> TargetKind:
    """Return the kind with safetensors files of at most `max_shard_bytes`."""
    return TargetKind(partial(hf_layout, max_shard_bytes=max_shard_bytes), manifest_in_config=True)


def hf_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    expansion: Expansion | None = None,
    dtype: str | None = None,
    dial: DialSetting | None = None,
    kind: TargetKind = TORCH_DIST,
    options: Options = DEFAULTS,
) -> Conversion:
    """Convert a Hugging Face LLaMA to a Megatron checkpoint of either format. An `expansion` adds blocks on the way.

    `dtype` (float32, bfloat16, float16) casts the weights. By default they keep the source's type. `dial` dials a
    trained model; it cannot be combined with an `expansion`.

    Raises:
        CheckpointError: the source cannot be converted or dialed, or the target cannot be written.
        ConfigError: the dial is out of range.
        ExpansionError: the blocks cannot be added as requested.
    """
    checkpoint = open_hf(Path(source))
    return write_checkpoint(
        checkpoint, Path(target), kind, expansion=expansion, dtype=dtype, dial=dial, options=options
    )


def megatron_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    expansion: Expansion | None = None,
    dtype: str | None = None,
    dial: DialSetting | None = None,
    kind: TargetKind = TORCH_DIST,
    merge_adapters: bool = True,
    options: Options = DEFAULTS,
) -> Conversion:
    """Convert a Megatron checkpoint to another format or division of ranks, or add another round of blocks to it.

    Without `merge_adapters`, low-rank adapters are left out. Other arguments and errors: see `hf_to_megatron`.
    """
    checkpoint = open_megatron_checkpoint(Path(source))
    if not merge_adapters:
        checkpoint = dataclasses.replace(checkpoint, adapters={})
    return write_checkpoint(
        checkpoint, Path(target), kind, expansion=expansion, dtype=dtype, dial=dial, options=options
    )


def expand_hf(
    source: str | Path,
    target: str | Path,
    *,
    expansion: Expansion,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    options: Options = DEFAULTS,
) -> Conversion:
    """Expand a Hugging Face checkpoint to another one. Arguments and errors: see `hf_to_megatron`."""
    kind = hugging_face(max_shard_bytes)
    return write_checkpoint(
        open_hf(Path(source)), Path(target), kind, expansion=expansion, dtype=dtype, options=options
    )


def hf_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    dial: DialSetting | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    options: Options = DEFAULTS,
) -> Conversion:
    """Dial a Hugging Face checkpoint, cast it, or divide it into other files. Arguments and errors: see
    `hf_to_megatron`."""
    kind = hugging_face(max_shard_bytes)
    return write_checkpoint(open_hf(Path(source)), Path(target), kind, dtype=dtype, dial=dial, options=options)


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    dial: DialSetting | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    options: Options = DEFAULTS,
) -> Conversion:
    """Convert a Megatron checkpoint, trained or not, to Hugging Face. Arguments and errors: see `hf_to_megatron`."""
    checkpoint = open_megatron_checkpoint(Path(source))
    return write_checkpoint(checkpoint, Path(target), hugging_face(max_shard_bytes), dial=dial, options=options)


def write_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    kind: TargetKind,
    *,
    expansion: Expansion | None = None,
    dtype: str | None = None,
    dial: DialSetting | None = None,
    options: Options,
) -> Conversion:
    """Write an opened checkpoint to `target`, as `kind`. Other arguments and errors: see `hf_to_megatron`.

    A checkpoint may have tensors in several folders, and computed ones: see `formats.adapters.rows_of`.
    """
    started = time.monotonic()
    model = _target_model(checkpoint, expansion, dtype)
    layout = kind.layout(draft_of(target), model.shape, model.dtype)
    original = _original(checkpoint, expansion, dial)
    before = checkpoint.manifest and checkpoint.manifest.dial
    options.on_total(model.num_bytes)
    sources = folders_of(checkpoint, *([original] if original else []))
    staging = staged(target, overwrite=options.overwrite, resume=options.resume, sources=sources, journal=JOURNAL)
    with staging as draft, ExitStack() as stack:
        if dial:  # reads tensors: only after the target's checks
            checkpoint = dialed(checkpoint, dial.scale, original=original)
        files = stack.enter_context(SourceFiles(checkpoint.states))
        check_stored_head(checkpoint, files)
        # The transfer hashes every tensor, so the tensors of a base are checked after it. Hashes of cast tensors say
        # nothing about the source, so a cast reads and checks the source first.
        if model.dtype != checkpoint.dtype:
            check_base_tensors(
                checkpoint, lambda name: stored_hash(checkpoint.tensors[name], files, checkpoint.itemsize)
            )
        jobs = _jobs(_origins(checkpoint, files, model), layout, model)
        journal = open_journal(draft, _fingerprint(checkpoint, model, layout), layout)
        check_space(target, draft, jobs, journal)
        copy_side_files(checkpoint.folder, draft)
        done_before = transfer(
            jobs,
            layout.files,
            journal,
            itemsize=ITEMSIZES[model.dtype],
            num_workers=options.workers,
            progress=options.progress,
        )
        files.check_unchanged()
        hashes = {job.name: journal.hashes[job.name] for job in jobs}
        if model.dtype == checkpoint.dtype:
            rounds = checkpoint.plan.num_rounds
            source_hashes = {name: hashes[name_now(name, model.plan, rounds)] for name in checkpoint.tensors}
            check_base_tensors(checkpoint, lambda name: unmerged_hash(checkpoint, name, source_hashes, files))
        manifest = target_manifest(checkpoint, model.plan, dtype=model.dtype, expansion=model.expansion, hashes=hashes)
        _write_small_files(draft, layout, kind, model, manifest)
    return Conversion(
        target=target,
        plan=model.plan,
        num_source_layers=checkpoint.shape.num_layers,
        dtype=model.dtype,
        num_bytes=model.num_bytes,
        num_resumed_bytes=done_before,
        is_foreign=checkpoint.manifest is None and checkpoint.format is not Format.HUGGING_FACE,
        seconds=time.monotonic() - started,
        num_merged=checkpoint.num_adapters,
        dial=manifest.dial if manifest.dial != before else None,
        left_out_code=without_code(checkpoint.config) != checkpoint.config,
        left_out_notices=notices_left_out(checkpoint.folder),
    )


def _original(checkpoint: Checkpoint, expansion: Expansion | None, dial: DialSetting | None) -> Checkpoint | None:
    """Open the original that a dial names. Raise the errors of a dial that no tensor needs to be read for."""
    if dial is None:
        return None
    if expansion is not None:
        raise ExpansionError("blocks cannot be added to a model while it is dialed: dial it, then expand the result")
    block_scale(dial.scale, num_added_blocks=len(checkpoint.plan.added_layers))
    return open_checkpoint(Path(dial.original)) if dial.original else None


@dataclass(frozen=True)
class _Model:
    """The model to write."""

    plan: ExpansionPlan
    config: dict
    """config.json, without a manifest."""
    shape: ModelShape
    dtype: str
    expansion: Expansion | None

    @property
    def num_bytes(self) -> int:
        sizes = (size for _, _, size in iter_hf(weights_of(self.shape)))
        return ITEMSIZES[self.dtype] * sum(math.prod(size) for size in sizes)


def _target_model(source: Checkpoint, expansion: Expansion | None, dtype: str | None) -> _Model:
    if dtype is not None and dtype not in ITEMSIZES:
        raise CheckpointError(f"dtype '{dtype}' is unknown: use one of {', '.join(ITEMSIZES)}")
    if source.other_dtypes and dtype is None:
        name, other = next(iter(source.other_dtypes.items()))
        raise CheckpointError(
            f"{source.folder} mixes types: {name} is {other}, most are {source.dtype}: give --dtype {source.dtype} or "
            f"--dtype {other}"
        )
    plan = source.plan
    config = without_code({key: value for key, value in source.config.items() if key != MANIFEST_KEY})
    if expansion is not None:
        plan = expansion.expand(plan)
        if expansion.init is Init.ZERO_NORM and source.shape.add_qkv_bias:
            raise ExpansionError("init zero_norm is not an identity if queries, keys and values have biases: use copy")
        config = expanded_hf_config(config, plan)
    config = spelled_for_all(config)
    return _Model(plan, config, model_shape(config), dtype or source.dtype, expansion)


def _origins(source: Checkpoint, files: SourceFiles, model: _Model) -> Origins:
    if model.expansion is None:
        return Origins(source, files, model.plan, model.dtype)
    return Origins(source, files, model.plan, model.dtype, model.expansion.init, model.expansion.seed)


def _jobs(origins: Origins, layout: TargetLayout, model: _Model) -> list[TensorJob]:
    """Return one job per tensor, in the order of the layout."""
    weight_of = {name: (weight, size) for weight, name, size in iter_hf(weights_of(model.shape))}
    itemsize = ITEMSIZES[model.dtype]
    return [
        TensorJob(name, origins.rows(weight_of[name][0], name), copies, itemsize * math.prod(weight_of[name][1]))
        for name, copies in layout.tensors.items()
    ]


def _fingerprint(source: Checkpoint, model: _Model, layout: TargetLayout) -> str:
    """Return a hash that a journal must match. It covers the source's state and the target's bytes and places."""
    hasher = blake3()
    states = [(str(path.resolve()), state) for path, state in sorted(source.states.items())]
    lineage = source.manifest and source.manifest.to_json()
    what = [VERSION, states, source.config, lineage, model.config, model.plan.to_json(), model.dtype]
    if model.expansion is not None:
        what += [model.expansion.init.value, model.expansion.seed]
    hasher.update(json.dumps(what).encode())
    for file in layout.files:
        hasher.update(repr((str(file.path), file.num_bytes, file.fixed)).encode())
    for name, copies in layout.tensors.items():
        hasher.update(repr((name, [copy.pieces for copy in copies])).encode())
    return hasher.hexdigest()


def _write_small_files(draft: Path, layout: TargetLayout, kind: TargetKind, model: _Model, manifest: Manifest) -> None:
    for name, content in layout.small_files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_bytes(content)
    in_config = manifest if kind.manifest_in_config else None
    (draft / CONFIG_NAME).write_bytes(config_text(model.config, dtype=model.dtype, manifest=in_config))
    manifest.write(draft)
