"""The mean of several checkpoints of a run, written as one model.

Only trained tensors are averaged, a few megabytes of rows at a time. A delta checkpoint has no others; the frozen
tensors are its base's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from megatron_llamapro.checkpoint.convert import TargetKind, hugging_face, write_checkpoint
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.folders import iteration_of
from megatron_llamapro.checkpoint.formats.open import open_megatron_checkpoint
from megatron_llamapro.checkpoint.hashes import tensor_hashes
from megatron_llamapro.checkpoint.report import Conversion
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, combined_hash
from megatron_llamapro.checkpoint.writing import DEFAULTS, Options, folders_of
from megatron_llamapro.config.drafts import check_target
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.manifest import Manifest, tool_versions
from megatron_llamapro.expansion.provenance import AveragedCheckpoint


def average(
    checkpoints: Iterable[str | Path],
    target: str | Path,
    *,
    kind: TargetKind | None = None,
    options: Options = DEFAULTS,
) -> Conversion:
    """Write the mean of Megatron checkpoints of one run, computed in float32 (default: to Hugging Face).

    A run's folder counts as its newest checkpoint. The order of `checkpoints` does not matter. If low-rank adapters
    were trained, the merged weights are averaged.

    Raises:
        CheckpointError: there are fewer than two checkpoints; one is given twice, cannot be read or has no manifest;
            they differ in model, added blocks, base or trained tensors; or the target cannot be written.
    """
    opened = _opened(list(checkpoints))
    first, *others = opened
    for other in others:
        _check_same(first, other)
    check_target(Path(target), overwrite=options.overwrite, sources=folders_of(*opened))
    assert first.manifest is not None
    names = _trained_names(first)
    states = {path: state for each in opened for path, state in each.states.items()}
    mean = replace(
        first,
        states=states,
        averaged_with=dict.fromkeys(names, tuple(others)),
        manifest=replace(
            first.manifest, averaged=_records(opened, names, states, options), tool_versions=tool_versions()
        ),
    )
    return write_checkpoint(mean, Path(target), kind or hugging_face(), options=options)


def _opened(checkpoints: Sequence[str | Path]) -> list[Checkpoint]:
    """Return the checkpoints in the order of their steps, then of their paths: sums in float32 depend on the order."""
    if len(checkpoints) < 2:
        raise CheckpointError("a mean needs two checkpoints or more: name others of the run")
    opened = [open_megatron_checkpoint(Path(folder)) for folder in checkpoints]
    folders = [each.folder.resolve() for each in opened]
    for folder in folders:
        if folders.count(folder) > 1:
            raise CheckpointError(f"{folder} is given twice: name each checkpoint once")
    for each in opened:
        if each.manifest is None:
            raise CheckpointError(f"{each.folder} has no llamapro.json: average checkpoints of a run of this trainer")
    return sorted(opened, key=lambda each: (iteration_of(each.folder) or 0, each.folder.resolve()))


def _trained_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors to average. A full checkpoint does not say what trained, so these are all."""
    frozen = checkpoint.base.delta.base_hashes if checkpoint.base else {}
    return [name for name in checkpoint.tensors if name not in frozen or name in checkpoint.adapters]


# What the checkpoints of a run have in common.
_SAME: dict[str, Callable[[Checkpoint], object]] = {
    "family and shape": lambda each: (each.config["model_type"], each.shape),
    "added blocks": lambda each: each.manifest and _blocks(each.manifest),
    "type": lambda each: each.dtype,
    "original model": lambda each: each.manifest and dict(each.manifest.original_hashes),
    "trainable part": lambda each: (each.base is None, _trained_names(each), each.adapters.keys()),
    "base": lambda each: each.base and dict(each.base.delta.base_hashes),
}


def _blocks(manifest: Manifest) -> tuple[object, ...]:
    return manifest.plan, manifest.inits, manifest.init_seeds, manifest.dial


def _check_same(first: Checkpoint, other: Checkpoint) -> None:
    for what, value_of in _SAME.items():
        if value_of(first) != value_of(other):
            raise CheckpointError(
                f"{first.folder} and {other.folder} do not have the same {what}: average checkpoints of one run"
            )


def _records(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], states: dict, options: Options
) -> tuple[AveragedCheckpoint, ...]:
    """Return the manifest's records of the checkpoints. Reads the tensors to average once, to hash them."""
    sizes = (checkpoints[0].tensors[name] for name in names)
    options.on_total(
        len(checkpoints) * checkpoints[0].itemsize * sum(size.num_rows * size.num_columns for size in sizes)
    )
    with SourceFiles(states) as files, ThreadPoolExecutor(options.workers) as pool:
        return tuple(
            AveragedCheckpoint(
                name=_name_of(each.folder),
                iteration=iteration_of(each.folder),
                hash=combined_hash(tensor_hashes(each, names, files, pool, progress=options.progress)),
            )
            for each in checkpoints
        )


def _name_of(folder: Path) -> str:
    folder = folder.resolve()
    return folder.name if iteration_of(folder) is None else f"{folder.parent.name}/{folder.name}"
