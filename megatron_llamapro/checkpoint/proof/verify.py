"""Proves that an expanded model is correct: the same function before training, unchanged original tensors after.

Every claim is a `Check`. Both checkpoints are read a few megabytes at a time. The manifest's lineage is checked against
the tensors: every added block is computed again from the blocks that the manifest names as its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_llamapro.checkpoint.formats.adapters import unmerged_hash
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.hf_reader import check_stored_head
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.hashes import tensor_hashes
from megatron_llamapro.checkpoint.lineage import name_now, original_name
from megatron_llamapro.checkpoint.proof.added_blocks import AddedBlocks, BlockReport, BlockState
from megatron_llamapro.checkpoint.proof.dial_proof import DialProof
from megatron_llamapro.checkpoint.proof.same_function import CastTensors, Check, check_function
from megatron_llamapro.checkpoint.tensors.streaming import Progress, SourceFiles, nothing
from megatron_llamapro.checkpoint.tensors.transfer import default_workers
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.dial_record import DialRecord
from megatron_llamapro.expansion.plan import Trained
from megatron_llamapro.families.shape import ModelShape


def verify(
    original: str | Path,
    expanded: str | Path,
    *,
    quick: bool = False,
    trained: Trained = Trained.NEW_BLOCKS,
    undialed: str | Path | None = None,
    num_workers: int = 0,
    progress: Progress = nothing,
) -> Iterator[Check]:
    """Compare `expanded` (any format, trained or not) with the checkpoint that it was made from. Yield:

    1. the lineage,
    2. the dial, if `expanded` is dialed,
    3. the original tensors,
    4. their hashes in the manifest,
    5. the base, if `expanded` is a delta checkpoint,
    6. blocks that earlier rounds had added,
    7. blocks added since,
    8. the function, if no block is trained yet, or all are dialed to 0, and not `quick`.

    `trained` says which blocks may have moved. `undialed` is the checkpoint that was dialed, to prove the dial:
    original tensors that it moved are then left out of checks 3 and 4. `progress` is called with the number of bytes
    that were read. Nothing is compared until the caller iterates.

    Raises:
        CheckpointError: one of them cannot be read; `expanded` does not say which blocks were added; or it is not
            dialed, but `undialed` is given.
    """
    source, result = open_checkpoint(Path(original)), open_checkpoint(Path(expanded))
    if result.manifest is None:
        raise CheckpointError(f"{expanded} has no manifest to say which blocks were added: convert the model again")
    if result.other_dtypes:
        other = next(iter(result.other_dtypes.values()))
        raise CheckpointError(f"{expanded} mixes {result.dtype} and {other}: convert it with --dtype, then verify")
    run = _undialed(undialed, result)
    lineage = _check_lineage(source, result)
    yield lineage
    if not lineage.ok:
        return
    with (
        SourceFiles({**source.states, **result.states, **(run.states if run else {})}) as files,
        ThreadPoolExecutor(num_workers or default_workers()) as pool,
    ):
        for checkpoint in (source, result):
            check_stored_head(checkpoint, files)
        dialed: frozenset[str] = frozenset()
        if result.manifest.dial:
            dial = _check_dial(
                DialProof(source, run, result, files, progress) if run else None, result.manifest.dial, pool
            )
            yield dial
            dialed = frozenset(result.manifest.dial.undialed_hashes if run and dial.ok else ())
        hashes = tensor_hashes(result, result.tensors, files, pool, types=(result.dtype,), progress=progress)
        kept = dataclasses.replace(_kept(source, result, hashes, files, pool, progress), dialed=dialed)
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
        may_differ = (trained is Trained.ADDED_BLOCKS and kept.moved(kept.earlier)) or kept.moved(kept.dialed_originals)
        if not quick and not may_differ and not any(block.state is BlockState.TRAINED for block in blocks):
            yield check_function(
                CastTensors(source, files, kept.types, progress), CastTensors(result, files, (result.dtype,), progress)
            )


def _undialed(folder: str | Path | None, result: Checkpoint) -> Checkpoint | None:
    if folder is None:
        return None
    if result.manifest is None or result.manifest.dial is None:
        raise CheckpointError(f"{result.folder} is not dialed, its llamapro.json records no dial: leave out --undialed")
    return open_checkpoint(Path(folder))


def _check_dial(proof: DialProof | None, record: DialRecord, pool: ThreadPoolExecutor) -> Check:
    if proof is not None:
        return proof.check(pool)
    text = f"recorded as {record}, but not checked: give --undialed, the checkpoint before the dial"
    return Check("dial", ok=True, text=text)


def _check_lineage(source: Checkpoint, result: Checkpoint) -> Check:
    """Check that the original has the blocks, in order, that the expanded model's plan names as the original's."""
    before, after = source.plan, result.plan
    if after.after(after.num_rounds) != after:
        return Check("lineage", ok=False, text="its plan does not follow from its rounds")
    if after.num_rounds < before.num_rounds or after.after(before.num_rounds) != before:
        problem = f"its plan does not start from the original's {before.num_layers} blocks"
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
    """The tensors that `source` and `result` both have."""

    source: Checkpoint
    result: Checkpoint
    types: tuple[str, ...]
    """The types that the source's tensors are cast to, in turn. The last is the result's."""
    expected: Mapping[str, str]
    """Hashes of the source's tensors after these casts, by their names in `source`."""
    actual: Mapping[str, str]
    """Hashes of the result's tensors, by their names in `result`."""

    dialed: frozenset[str] = frozenset()
    """Tensors whose dial is proven, by their names in `result`."""

    @cached_property
    def earlier(self) -> list[str]:
        """Tensors of added blocks that `source` already had, by their names in `source`."""
        return [name for name in self.expected if original_name(name, self.source.plan) is None]

    @cached_property
    def originals(self) -> list[str]:
        """Tensors of the first source model that are not dialed, by their names in `source`."""
        return [name for name in self._of_first_source if self.now(name) not in self.dialed]

    @cached_property
    def dialed_originals(self) -> list[str]:
        """Tensors of the first source model that are dialed, by their names in `source`."""
        return [name for name in self._of_first_source if self.now(name) in self.dialed]

    @cached_property
    def _of_first_source(self) -> list[str]:
        return [name for name in self.expected if original_name(name, self.source.plan) is not None]

    def now(self, name: str) -> str:
        """Return a tensor's name in `result`, given its name in `source`."""
        return name_now(name, self.result.plan, self.source.plan.num_rounds)

    def moved(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` whose tensors differ, by their names in `result`."""
        return [self.now(name) for name in names if self.actual[self.now(name)] != self.expected[name]]


def _kept(
    source: Checkpoint,
    result: Checkpoint,
    actual: Mapping[str, str],
    files: SourceFiles,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> _SharedTensors:
    """Return the tensors of `source` that are in `result`, whose hashes are `actual`.

    If the manifest records a cast to a narrower type, the source may be from before the cast. It may also be from after
    it: trained since, in a wider type, and expanded again. The assumption under which fewer tensors differ is used.
    """

    def after(*types: str) -> _SharedTensors:
        expected = tensor_hashes(source, source.tensors, files, pool, types=types, progress=progress)
        return _SharedTensors(source, result, types, expected, actual)

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
    """Check that tensors of the first source model equal the original's, bit for bit."""
    types, number = _types(kept.source), len(kept.originals)
    casts = f", after the cast from {' and '.join(types)} to {', then to '.join(kept.types)}"
    how = casts if types != [*kept.types] else ""
    moved = kept.moved(kept.originals)
    return _check_none(moved, "original tensors", f"of {number} moved", f"{number} bit-identical{how}")


def _hashes_as_noted(
    kept: _SharedTensors, files: SourceFiles, pool: ThreadPoolExecutor, progress: Progress
) -> Mapping[str, str] | None:
    """Return hashes of the original tensors, by their names in `source`, in the type of the manifest's hashes.

    They are those of `result`, or those of `source` if `result` was cast since. None if `source` has other values in
    that type.
    """
    source, result = kept.source, kept.result
    assert result.manifest is not None
    noted_in = result.manifest.hash_dtype
    if result.dtype == noted_in:
        return {name: kept.actual[kept.now(name)] for name in kept.originals}
    if _types(source) == [noted_in] or noted_in in kept.types:
        return tensor_hashes(source, source.tensors, files, pool, types=(noted_in,), progress=progress)
    return None


def _check_manifest(kept: _SharedTensors, hashes: Mapping[str, str] | None) -> Check:
    """Check that tensors of the first source model have the hashes that the first conversion wrote to the manifest."""
    source, manifest, number = kept.source, kept.result.manifest, len(kept.originals)
    assert manifest is not None
    if hashes is None:
        text = (
            f"nothing is proven: its hashes are of {manifest.hash_dtype} tensors, but both models have another type; "
            f"compare with the {manifest.hash_dtype} original"
        )
        return Check("manifest", ok=True, text=text)
    noted = {name: manifest.original_hashes.get(str(original_name(name, source.plan))) for name in kept.originals}
    differing = [name for name in kept.originals if hashes[name] != noted[name]]
    if differing and source.plan.num_rounds and not kept.moved(differing):
        text = f"{_some(differing)} of {number} differ from their hash, as they do in the original: trained before"
        return Check("manifest", ok=True, text=text)
    problem = f"of {number} original tensors do not match their hash"
    return _check_none([*map(kept.now, differing)], "manifest", problem, f"{number} original tensors match their hash")


def _check_base(result: Checkpoint, hashes: Mapping[str, str], files: SourceFiles) -> Check:
    """Check that a delta checkpoint's tensors in its base are those that the run trained with."""
    assert result.base is not None
    expected = result.base.delta.base_hashes
    differing = [name for name, value in expected.items() if unmerged_hash(result, name, hashes, files) != value]
    where = f"tensors of {result.base.folder}"
    problem = f"of {len(expected)} {where} are not those that the run trained with"
    return _check_none(differing, "base", problem, f"{len(expected)} {where} are those that the run trained with")


def _check_earlier(kept: _SharedTensors, trained: Trained) -> Check:
    """Check that blocks of earlier rounds equal the original's, unless they may have been trained since."""
    moved, number = kept.moved(kept.earlier), len(kept.earlier)
    if moved and trained is Trained.ADDED_BLOCKS:
        return Check("earlier rounds", ok=True, text=f"{len(moved)} of {number} tensors trained since")
    problem = f"of {number} moved (if this round trained them too, give --trained {Trained.ADDED_BLOCKS.value})"
    return _check_none(moved, "earlier rounds", problem, f"{number} tensors of their blocks bit-identical")


def _check_none(names: list[str], claim: str, problem: str, success: str) -> Check:
    return Check(claim, ok=not names, text=f"{_some(names)} {problem}" if names else success)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _check_blocks(blocks: Sequence[BlockReport], trained: Trained) -> Check:
    moved = {BlockState.TRAINED, BlockState.OFF} if trained is Trained.NOTHING else set()
    faults = {BlockState.WRONG, *moved}
    wrong = [f"block {block.layer}: {block.text}" for block in blocks if block.state in faults]
    if wrong:
        return Check("added blocks", ok=False, text="; ".join(wrong))
    parts = []
    for state in (BlockState.IDENTITY, BlockState.RANDOM, BlockState.OFF, BlockState.TRAINED):
        layers = [str(block.layer) for block in blocks if block.state is state]
        if layers:
            parts.append(f"{', '.join(layers)}: {state.value}")
    return Check("added blocks", ok=True, text="; ".join(parts))
