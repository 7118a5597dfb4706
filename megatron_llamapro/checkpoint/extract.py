"""Writes the added blocks of a run as a pack. The manifest's hashes must prove that nothing else was trained."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from megatron_llamapro.checkpoint.formats.adapters import rows_of, unmerged_hash
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.hf_reader import check_stored_head
from megatron_llamapro.checkpoint.formats.hf_writer import safetensors_layout
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.hashes import tensor_hashes
from megatron_llamapro.checkpoint.lineage import check_base_tensors, original_name
from megatron_llamapro.checkpoint.pack import BLOCKS_FILE, PackRecord, block_tensors
from megatron_llamapro.checkpoint.side_files import copy_notices, without_code
from megatron_llamapro.checkpoint.tensors.layout import TargetLayout
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles
from megatron_llamapro.checkpoint.tensors.transfer import TensorJob, transfer
from megatron_llamapro.checkpoint.writing import DEFAULTS, JOURNAL, Options, check_space, folders_of, open_journal
from megatron_llamapro.config.drafts import draft_of, staged
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.version import VERSION
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.hf_config import MANIFEST_KEY, HfModel


@dataclass(frozen=True)
class Extraction:
    """The result of an extraction."""

    target: Path
    record: PackRecord
    num_bytes: int
    num_originals: int
    """The number of original tensors whose hashes were compared."""


def extract(source: str | Path, target: str | Path, *, options: Options = DEFAULTS) -> Extraction:
    """Write the added blocks of a checkpoint of any format, or of a run's newest one, as a pack.

    Low-rank adapters of added blocks are merged.

    Raises:
        CheckpointError: the source cannot be read; it is not one round of added blocks on original tensors that have
            the manifest's hashes; or the target cannot be written.
    """
    checkpoint, target = open_checkpoint(Path(source)), Path(target)
    manifest = _manifest_of(checkpoint)
    sizes = block_tensors(checkpoint.shape, manifest.plan)
    layout = safetensors_layout(draft_of(target) / BLOCKS_FILE, list(sizes.items()), checkpoint.dtype)
    options.on_total(checkpoint.weight_bytes)
    sources = folders_of(checkpoint)
    staging = staged(target, overwrite=options.overwrite, resume=options.resume, sources=sources, journal=JOURNAL)
    with staging as draft, SourceFiles(checkpoint.states) as files:
        check_stored_head(checkpoint, files)
        originals = _proven_originals(checkpoint, manifest, files, options)
        jobs = _jobs(checkpoint, files, layout)
        journal = open_journal(draft, _fingerprint(checkpoint, layout), layout)
        check_space(target, draft, jobs, journal)
        copy_notices(checkpoint.folder, draft)
        transfer(
            jobs,
            layout.files,
            journal,
            itemsize=checkpoint.itemsize,
            num_workers=options.workers,
            progress=options.progress,
        )
        files.check_unchanged()
        hashes = {name: journal.hashes[name] for name in sizes}
        check_base_tensors(checkpoint, lambda name: unmerged_hash(checkpoint, name, {**originals, **hashes}, files))
        config = {key: value for key, value in checkpoint.config.items() if key != MANIFEST_KEY}
        record = PackRecord(HfModel(without_code(config), checkpoint.shape), manifest, hashes)
        record.write(draft)
    return Extraction(target, record, sum(job.num_bytes for job in jobs), len(originals))


def _manifest_of(checkpoint: Checkpoint) -> Manifest:
    """Return the manifest. Raise `CheckpointError` if the checkpoint cannot be a pack, as far as headers show."""
    folder, manifest = checkpoint.folder, checkpoint.manifest
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no llamapro.json to say which blocks were added: extract from a run, or its export"
        )
    if not manifest.plan.num_rounds:
        raise CheckpointError(f"{folder} has no added blocks: there is nothing to extract")
    if manifest.plan.num_rounds > 1:
        raise CheckpointError(
            f"{folder} has blocks of {manifest.plan.num_rounds} rounds, but a pack holds those of one, trained on the "
            "original model: extract from a run of one round"
        )
    if manifest.dial is not None:
        raise CheckpointError(
            f"{folder} was dialed ({manifest.dial}): extract from the checkpoint that was dialed, and give compose the "
            "scale"
        )
    if checkpoint.other_dtypes:
        raise CheckpointError(f"{folder} mixes types: convert it with --dtype, then extract from the result")
    if checkpoint.dtype not in (manifest.hash_dtype, "float32"):
        raise CheckpointError(
            f"{folder} was cast from {manifest.hash_dtype} to {checkpoint.dtype}, so its hashes do not show whether "
            f"its original tensors are untouched: extract from the {manifest.hash_dtype} checkpoint"
        )
    return manifest


def _proven_originals(
    checkpoint: Checkpoint, manifest: Manifest, files: SourceFiles, options: Options
) -> dict[str, str]:
    """Return the hashes of the original tensors as they are stored, by their names in the checkpoint.

    Raises:
        CheckpointError: one is not the original's.
    """
    first = {name: original_name(name, manifest.plan) for name in checkpoint.tensors}
    names = [name for name, before in first.items() if before is not None]
    noted_in, now = manifest.hash_dtype, checkpoint.dtype
    with ThreadPoolExecutor(options.workers) as pool:
        found = tensor_hashes(checkpoint, names, files, pool, progress=options.progress)
        as_noted, there_and_back = found, found
        if noted_in != now:  # a wider type now: the cast to the hashes' type must lose nothing
            as_noted = tensor_hashes(checkpoint, names, files, pool, types=(now, noted_in))
            there_and_back = tensor_hashes(checkpoint, names, files, pool, types=(now, noted_in, now))
    for name in names:
        if as_noted[name] != manifest.original_hashes.get(str(first[name])) or found[name] != there_and_back[name]:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is not the original's (its hash differs), so more than added blocks was "
                "trained: a pack cannot hold it"
            )
    return found


def _jobs(checkpoint: Checkpoint, files: SourceFiles, layout: TargetLayout) -> list[TensorJob]:
    sizes = {name: copies[0].num_rows * copies[0].num_columns for name, copies in layout.tensors.items()}
    return [
        TensorJob(name, rows_of(checkpoint, name, files), copies, checkpoint.itemsize * sizes[name])
        for name, copies in layout.tensors.items()
    ]


def _fingerprint(checkpoint: Checkpoint, layout: TargetLayout) -> str:
    """Return a hash that a journal must match: of the source's state and the target's bytes."""
    states = [(str(path.resolve()), state) for path, state in sorted(checkpoint.states.items())]
    files = [(str(file.path), file.num_bytes, [data.hex() for _, data in file.fixed]) for file in layout.files]
    return blake3(json.dumps([VERSION, "pack", states, files]).encode()).hexdigest()
