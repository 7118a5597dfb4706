"""Proof that an expanded model is what it should be: identical in function before training, untouched originals after.

Every claim is a `Check`. Both checkpoints are read a few megabytes at a time; what a manifest says of the lineage is
held against the tensors: every added block is computed again from what the manifest says it was made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_llamapro.checkpoint.formats.adapters import rows_of, unmerged_hash
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.hf_reader import check_stored_head
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.lineage import name_now, original_name
from megatron_llamapro.checkpoint.proof.added_blocks import AddedBlocks, BlockReport, BlockState
from megatron_llamapro.checkpoint.proof.same_function import CastTensors, Check, check_function
from megatron_llamapro.checkpoint.tensors.computed import cast_along
from megatron_llamapro.checkpoint.tensors.streaming import Progress, SourceFiles, hash_rows, nothing
from megatron_llamapro.checkpoint.tensors.transfer import default_workers
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import Trained
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape


def verify(
    original: str | Path,
    expanded: str | Path,
    *,
    quick: bool = False,
    trained: Trained = Trained.NEW_BLOCKS,
    num_workers: int = 0,
    progress: Progress = nothing,
) -> Iterator[Check]:
    """Compare `expanded` (any format, trained or not) with the checkpoint it was made from.

    Lineage, original tensors, their hashes in the manifest, blocks that earlier rounds had added, blocks added since;
    and, where no block was trained yet and not `quick`, the function. `trained` says which blocks may have moved.
    `progress` is called with the bytes that were read. Nothing is compared until the caller iterates.

    Raises:
        CheckpointError: one of the two cannot be read, or `expanded` does not say which blocks were added.
    """
    source, result = open_checkpoint(Path(original)), open_checkpoint(Path(expanded))
    if result.manifest is None:
        raise CheckpointError(f"{expanded} has no manifest, so nothing says which of its blocks were added")
    if result.other_dtypes:
        other = next(iter(result.other_dtypes.values()))
        raise CheckpointError(f"{expanded} mixes {result.dtype} and {other}: convert it with --dtype, then verify")
    lineage = _check_lineage(source, result)
    yield lineage
    if not lineage.ok:
        return
    with (
        SourceFiles({**source.states, **result.states}) as files,
        ThreadPoolExecutor(num_workers or default_workers()) as pool,
    ):
        for checkpoint in (source, result):
            check_stored_head(checkpoint, files)
        hashes = _hashes(result, (result.dtype,), files, pool, progress)
        kept = _kept(source, result, hashes, files, pool, progress)
        yield _check_originals(kept)
        yield _check_manifest(kept, _hashes_as_noted(kept, files, pool, progress))
        if result.base is not None:
            yield _check_base(result, hashes, files)
        if kept.earlier:
            yield _check_earlier(kept, trained)
        added = AddedBlocks(source, result, files, hashes, progress)
        blocks = list(pool.map(added.judge, added.layers))
        if blocks:
            yield _check_blocks(blocks, trained)
        may_differ = trained is Trained.ADDED_BLOCKS and kept.moved(kept.earlier)
        if not quick and not may_differ and not any(block.state is BlockState.TRAINED for block in blocks):
            yield check_function(
                CastTensors(source, files, kept.types, progress), CastTensors(result, files, (result.dtype,), progress)
            )


def _hashes(
    checkpoint: Checkpoint, types: Sequence[str], files: SourceFiles, pool: ThreadPoolExecutor, progress: Progress
) -> dict[str, str]:
    """The hash of every tensor, cast to each of `types` in turn."""

    def hash_of(name: str) -> str:
        tensor = checkpoint.tensors[name]
        rows = cast_along(rows_of(checkpoint, name, files, dtype=types[0]), types=types, name=name)
        return hash_rows(rows, tensor, ITEMSIZES[types[-1]], progress=progress)

    return dict(zip(checkpoint.tensors, pool.map(hash_of, checkpoint.tensors), strict=True))


def _check_lineage(source: Checkpoint, result: Checkpoint) -> Check:
    """The blocks of the original, in order, are those that the expanded model's plan says it had."""
    before, after = source.plan, result.plan
    if after.after(after.num_rounds) != after:
        return Check("lineage", ok=False, text="its plan is not what its rounds make")
    if after.num_rounds < before.num_rounds or after.after(before.num_rounds) != before:
        problem = f"its plan starts from other blocks than the original's {before.num_layers}"
        return Check("lineage", ok=False, text=problem)
    differing = _differing_fields(source.shape, result.shape.with_layers(after.layers_after(before.num_rounds)))
    if differing:
        return Check("lineage", ok=False, text=f"config.json differs from the original's in {', '.join(differing)}")
    added = after.num_layers - before.num_layers
    return Check("lineage", ok=True, text=f"{before.num_layers} blocks of the original and {added} added")


def _differing_fields(before: ModelShape, after: ModelShape) -> list[str]:
    names = [field.name for field in dataclasses.fields(ModelShape) if field.name != "num_layers"]
    return [name for name in names if getattr(before, name) != getattr(after, name)]


@dataclass(frozen=True)
class _SharedTensors:
    """Tensors that `source` and `result` both have."""

    source: Checkpoint
    result: Checkpoint
    types: tuple[str, ...]
    """The types that the source's are cast to, one after the other; the last is the result's."""
    expected: Mapping[str, str]
    """Hashes of the source's after these casts, by their names there."""
    actual: Mapping[str, str]
    """Hashes of the result's."""

    @cached_property
    def earlier(self) -> list[str]:
        """Those of blocks that were added before `source` was expanded, by their names in it."""
        return [name for name in self.expected if original_name(name, self.source.plan) is None]

    @cached_property
    def originals(self) -> list[str]:
        """Those of the first source model, by their names in `source`."""
        return [name for name in self.expected if original_name(name, self.source.plan) is not None]

    def now(self, name: str) -> str:
        """Its name in `result`."""
        return name_now(name, self.result.plan, self.source.plan.num_rounds)

    def moved(self, names: Iterable[str]) -> list[str]:
        """Those of them that differ, by their names in `result`."""
        return [self.now(name) for name in names if self.actual[self.now(name)] != self.expected[name]]


def _kept(
    source: Checkpoint,
    result: Checkpoint,
    actual: Mapping[str, str],
    files: SourceFiles,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> _SharedTensors:
    """What of `source` is in `result`, whose hashes are `actual`.

    Where the manifest tells of a cast to a narrower type, the source may be from before it, or from after it (trained
    since, in a wider type, and expanded again). The way that leaves fewer tensors that differ is taken.
    """

    def after(*types: str) -> _SharedTensors:
        return _SharedTensors(source, result, types, _hashes(source, types, files, pool, progress), actual)

    assert result.manifest is not None
    casts = result.manifest.casts
    if len(casts) == 1 or _types(source) == [casts[0]]:
        return after(result.dtype)
    before = after(*casts)
    if not before.moved(before.expected):
        return before
    return min(before, after(result.dtype), key=lambda kept: len(kept.moved(kept.expected)))


def _types(checkpoint: Checkpoint) -> list[str]:
    return sorted({checkpoint.dtype, *checkpoint.other_dtypes.values()})


def _check_originals(kept: _SharedTensors) -> Check:
    """Tensors of the first source model are the original's, bit for bit."""
    types, number = _types(kept.source), len(kept.originals)
    casts = f", after the cast from {' and '.join(types)} to {', then to '.join(kept.types)}"
    how = casts if types != [*kept.types] else ""
    moved = kept.moved(kept.originals)
    return _check_none(moved, "original tensors", f"of {number} moved", f"{number} bit-identical{how}")


def _hashes_as_noted(
    kept: _SharedTensors, files: SourceFiles, pool: ThreadPoolExecutor, progress: Progress
) -> Mapping[str, str] | None:
    """Hashes of the original tensors, by their names in `source`, in the type that the manifest noted them in: those
    of `result`, or of `source` where `result` was cast since; None where that has other values in that type."""
    source, result = kept.source, kept.result
    assert result.manifest is not None
    noted_in = result.manifest.hash_dtype
    if result.dtype == noted_in:
        return {name: kept.actual[kept.now(name)] for name in kept.originals}
    if _types(source) == [noted_in] or noted_in in kept.types:
        return _hashes(source, (noted_in,), files, pool, progress)
    return None


def _check_manifest(kept: _SharedTensors, hashes: Mapping[str, str] | None) -> Check:
    """Tensors of the first source model have the hashes that the manifest noted when they were first converted."""
    source, manifest, number = kept.source, kept.result.manifest, len(kept.originals)
    assert manifest is not None
    if hashes is None:
        text = (
            f"nothing is proven: its hashes are of {manifest.hash_dtype} tensors, and both models are of another type; "
            f"compare with the {manifest.hash_dtype} original"
        )
        return Check("manifest", ok=True, text=text)
    noted = {name: manifest.original_hashes.get(str(original_name(name, source.plan))) for name in kept.originals}
    differing = [name for name in kept.originals if hashes[name] != noted[name]]
    if differing and source.plan.num_rounds and not kept.moved(differing):
        text = f"{_some(differing)} of {number} do not have their hash, nor have they in the original: trained before"
        return Check("manifest", ok=True, text=text)
    problem = f"of {number} original tensors do not have their hash"
    return _check_none([*map(kept.now, differing)], "manifest", problem, f"{number} original tensors have their hash")


def _check_base(result: Checkpoint, hashes: Mapping[str, str], files: SourceFiles) -> Check:
    """What a delta checkpoint takes from its base is what it was trained with."""
    assert result.base is not None
    expected = result.base.delta.base_hashes
    differing = [name for name, value in expected.items() if unmerged_hash(result, name, hashes, files) != value]
    where = f"tensors of {result.base.folder}"
    problem = f"of {len(expected)} {where} are not those that were trained with"
    return _check_none(differing, "base", problem, f"{len(expected)} {where} are those that were trained with")


def _check_earlier(kept: _SharedTensors, trained: Trained) -> Check:
    """Blocks that the original already had from rounds before are its own, unless they may have been trained since."""
    moved, number = kept.moved(kept.earlier), len(kept.earlier)
    if moved and trained is Trained.ADDED_BLOCKS:
        return Check("earlier rounds", ok=True, text=f"{len(moved)} of {number} tensors trained since")
    problem = f"of {number} moved (if this round trained them too, say --trained {Trained.ADDED_BLOCKS.value})"
    return _check_none(moved, "earlier rounds", problem, f"{number} tensors of their blocks bit-identical")


def _check_none(names: list[str], claim: str, problem: str, success: str) -> Check:
    return Check(claim, ok=not names, text=f"{_some(names)} {problem}" if names else success)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _check_blocks(blocks: Sequence[BlockReport], trained: Trained) -> Check:
    faults = {BlockState.WRONG, BlockState.TRAINED} if trained is Trained.NOTHING else {BlockState.WRONG}
    wrong = [f"block {block.layer}: {block.text}" for block in blocks if block.state in faults]
    if wrong:
        return Check("added blocks", ok=False, text="; ".join(wrong))
    parts = []
    for state in (BlockState.IDENTITY, BlockState.RANDOM, BlockState.TRAINED):
        layers = [str(block.layer) for block in blocks if block.state is state]
        if layers:
            parts.append(f"{', '.join(layers)}: {state.value}")
    return Check("added blocks", ok=True, text="; ".join(parts))
