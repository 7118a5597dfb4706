"""Proof that an expanded model is what it should be: identical in function before training, untouched originals after.

Every claim is a `Check`. Both checkpoints are read a tensor at a time; what a manifest says of the
lineage is held against the tensors, as far as they can tell (of blocks that did not begin as copies: their zeros).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.checkpoint.added_blocks import BlockReport, BlockState, blocks_to_judge, judge_block
from megatron_llamapro.checkpoint.casting import CastRows
from megatron_llamapro.checkpoint.convert import default_workers
from megatron_llamapro.checkpoint.lineage import original_name
from megatron_llamapro.checkpoint.opened import Checkpoint
from megatron_llamapro.checkpoint.sources import OpenTensors, open_checkpoint
from megatron_llamapro.checkpoint.streaming import Progress, Rows, SourceFiles, StoredRows, hash_rows, nothing
from megatron_llamapro.checkpoint.weight_map import Weight, hf_name_in_layer, weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import ExpansionPlan, Layer
from megatron_llamapro.model.families import ITEMSIZES
from megatron_llamapro.model.shape import ModelShape

if TYPE_CHECKING:
    import torch

_NUM_TOKENS = 32  # the sequence that the function is compared on


@dataclass(frozen=True)
class Check:
    """One claim, and whether it holds."""

    name: str
    ok: bool
    text: str
    """What was found, with numbers and names."""

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {self.text}"


def verify(
    original: Path,
    expanded: Path,
    *,
    quick: bool = False,
    num_workers: int = 0,
    progress: Progress = nothing,
) -> Iterator[Check]:
    """Compare `expanded` (any format, trained or not) with the checkpoint it was made from.

    Lineage, original tensors, their hashes in the manifest, added blocks; and, where no added block is trained yet and
    not `quick`, the function. `progress` is called with the bytes that were read. Checks come as they are made.

    Raises:
        CheckpointError: one of the two cannot be read, or `expanded` does not say which blocks were added.
    """
    source, result = open_checkpoint(original), open_checkpoint(expanded)
    if result.manifest is None:
        raise CheckpointError(f"{expanded} has no manifest, so nothing says which of its blocks were added")
    lineage = _check_lineage(source, result)
    yield lineage
    if not lineage.ok:
        return
    with SourceFiles({**source.states, **result.states}) as files:
        hashes = _hashes(result, result.dtype, files, num_workers, progress)
        expected = _hashes(source, result.dtype, files, num_workers, progress)
        yield from _check_originals(source, result, expected, hashes)
        judged = blocks_to_judge(source.plan, result.plan)
        blocks = [judge_block(result, files, hashes, result.plan, index) for index in judged]
        if blocks:
            yield _check_blocks(blocks)
        if not quick and not any(block.state is BlockState.TRAINED for block in blocks):
            yield _check_function(*(_Watched(model, files, result.dtype, progress) for model in (source, result)))


def _hashes(
    checkpoint: Checkpoint, dtype: str, files: SourceFiles, num_workers: int, progress: Progress
) -> dict[str, str]:
    """The hash of every tensor, as it is in `dtype`."""

    def hash_of(name: str) -> str:
        tensor = checkpoint.tensors[name]
        rows: Rows = StoredRows(tensor, files, checkpoint.itemsize)
        if checkpoint.dtype != dtype:
            rows = CastRows(rows, source=checkpoint.dtype, target=dtype, name=name)
        return hash_rows(rows, tensor, ITEMSIZES[dtype], progress=progress)

    with ThreadPoolExecutor(num_workers or default_workers()) as pool:
        return dict(zip(checkpoint.tensors, pool.map(hash_of, checkpoint.tensors), strict=True))


class _Watched(OpenTensors):
    """Tensors in one type, that report every byte that is read of them."""

    def __init__(self, checkpoint: Checkpoint, files: SourceFiles, dtype: str, progress: Progress) -> None:
        super().__init__(checkpoint, files)
        self._wanted, self._progress = dtype, progress

    def tensor(self, name: str) -> torch.Tensor:
        tensor = super().tensor(name)
        self._progress(tensor.nbytes)
        return tensor.to(_torch_dtype(self._wanted))


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


def _check_lineage(source: Checkpoint, result: Checkpoint) -> Check:
    """The blocks of the original, in order, are those that the expanded model's plan says it had."""
    before, after = source.plan, result.plan
    kept = [i for i, layer in enumerate(after.layers) if layer.added_in_round <= before.num_rounds]
    differing = _differing_fields(source.shape, result.shape.with_layers(kept))
    if [_identity(after.layers[i]) for i in kept] != [_identity(layer) for layer in before.layers]:
        problem = f"its plan starts from other blocks than the original's {before.num_layers}"
        return Check("lineage", ok=False, text=problem)
    if differing:
        return Check("lineage", ok=False, text=f"config.json differs from the original's in {', '.join(differing)}")
    added = after.num_layers - before.num_layers
    return Check("lineage", ok=True, text=f"{before.num_layers} blocks of the original and {added} added")


def _identity(layer: Layer) -> tuple[int, int]:
    return layer.source_layer, layer.added_in_round


def _differing_fields(before: ModelShape, after: ModelShape) -> list[str]:
    names = [field.name for field in dataclasses.fields(ModelShape) if field.name != "num_layers"]
    return [name for name in names if getattr(before, name) != getattr(after, name)]


@dataclass
class _Comparison:
    """What was found about tensors that must not have moved."""

    compared: int = 0
    moved: list[str] = field(default_factory=list)
    hash_differs: list[str] = field(default_factory=list)


def _check_originals(
    source: Checkpoint, result: Checkpoint, expected: Mapping[str, str], actual: Mapping[str, str]
) -> Iterator[Check]:
    """Tensors of the first source model are the original's, bit for bit, and have the manifest's hashes."""
    found = _Comparison()
    assert result.manifest is not None
    for weight in weights_of(result.shape):
        for name in weight.hf_names:
            first_name = original_name(name, result.plan)
            if first_name is None:
                continue
            found.compared += 1
            if actual[name] != expected[_name_in_original(name, weight, source.plan, result.plan)]:
                found.moved.append(name)
            if actual[name] != result.manifest.original_hashes.get(first_name):
                found.hash_differs.append(name)
    was_cast = source.dtype != result.dtype
    how = f", after the cast from {source.dtype} to {result.dtype}" if was_cast else ""
    yield _check_none(
        found.moved, "original tensors", f"of {found.compared} moved", f"{found.compared} bit-identical{how}"
    )
    yield _check_none(
        found.hash_differs,
        "manifest",
        f"of {found.compared} original tensors do not have their hash",
        f"{found.compared} original tensors have their hash",
    )


def _check_none(names: list[str], claim: str, problem: str, success: str) -> Check:
    return Check(claim, ok=not names, text=f"{_some(names)} {problem}" if names else success)


def _name_in_original(name: str, weight: Weight, before: ExpansionPlan, after: ExpansionPlan) -> str:
    """The name, in the given original, of an original block's tensor of the expanded model."""
    if weight.layer is None:
        return name
    return hf_name_in_layer(name, before.original_layers[after.layers[weight.layer].source_layer])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _check_blocks(blocks: Iterable[BlockReport]) -> Check:
    wrong = [f"block {block.layer}: {block.text}" for block in blocks if block.state is BlockState.WRONG]
    if wrong:
        return Check("added blocks", ok=False, text="; ".join(wrong))
    parts = []
    for state in (BlockState.IDENTITY, BlockState.ZEROED, BlockState.TRAINED):
        layers = [str(block.layer) for block in blocks if block.state is state]
        if layers:
            parts.append(f"{', '.join(layers)}: {state.value}")
    return Check("added blocks", ok=True, text="; ".join(parts))


def _check_function(source: _Watched, result: _Watched) -> Check:
    """Logits of both models on the same random tokens, each computed from its own weights, block by block."""
    import torch

    from megatron_llamapro.checkpoint.reference import logits

    shape = source.shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (1, min(_NUM_TOKENS, shape.max_position_embeddings)), generator=generator)
    before, after = logits(source, tokens), logits(result, tokens)
    where = f"on {tokens.shape[1]} random tokens"
    if torch.equal(before, after):
        return Check("function", ok=True, text=f"logits are equal, bit for bit, {where}")
    largest = (before - after).abs().max().item()
    return Check("function", ok=False, text=f"logits differ by up to {largest:.3g} {where}")
