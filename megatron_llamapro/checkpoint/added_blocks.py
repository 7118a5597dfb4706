"""What has become of the blocks that an expansion added: identities still, trained, or neither, which is a fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy

from megatron_llamapro.checkpoint.opened import Checkpoint
from megatron_llamapro.checkpoint.streaming import SourceFiles, StoredRows, hash_rows
from megatron_llamapro.checkpoint.weight_map import Weight, hf_name_in_layer, is_block_norm, weights_of
from megatron_llamapro.expansion.inits import INITS, Init, InitRule
from megatron_llamapro.expansion.plan import ExpansionPlan


class BlockState(Enum):
    """What has become of an added block."""

    IDENTITY = "identity, as when added"
    ZEROED = "identity by its zeros, which began as no copy"
    TRAINED = "trained"
    WRONG = "wrong"


@dataclass(frozen=True)
class BlockReport:
    """An added block, judged."""

    layer: int
    state: BlockState
    text: str = ""
    """What is wrong."""


def blocks_to_judge(before: ExpansionPlan, after: ExpansionPlan) -> list[int]:
    """Blocks that were added since the original. (Those that it had already may have been trained in it.)"""
    return [i for i, layer in enumerate(after.layers) if layer.added_in_round > before.num_rounds]


def judge_block(
    result: Checkpoint, files: SourceFiles, hashes: Mapping[str, str], plan: ExpansionPlan, index: int
) -> BlockReport:
    """Judge one added block by its tensors and its parent's, both in the expanded model, whose tensors have `hashes`.

    Training moves what was zeroed first (its gradient is the only one that is not zero at step 0), so zeros there mean
    an untrained block, which must then be its parent's copy. Only the latest round's parents are known; an earlier
    round's block is judged by its zeros alone.
    """
    rule = _rule(result, plan, index)
    weights = [weight for weight in weights_of(result.shape) if weight.layer == index]
    zeroed = [name for weight in weights for name in weight.hf_names if _is_zeroed(weight, name, rule)]
    others = [name for weight in weights for name in weight.hf_names if not _is_zeroed(weight, name, rule)]
    parent = _parent_in(plan, index)
    all_zero = True
    for name in zeroed:
        found = _zeros(result, files, name)
        if found is _Zeros.NEGATIVE:
            return BlockReport(index, BlockState.WRONG, f"{name} holds -0.0, which is not the +0.0 it was given")
        if found is _Zeros.NONE:
            all_zero = False
            if parent is not None and hashes[name] == hashes[hf_name_in_layer(name, parent)]:
                return BlockReport(index, BlockState.WRONG, f"{name} is block {parent}'s, not zero")
    if not all_zero:
        return BlockReport(index, BlockState.TRAINED)
    if not rule.is_copy:
        return BlockReport(index, BlockState.ZEROED)
    if parent is not None:
        for name in others:
            if hashes[name] != hashes[hf_name_in_layer(name, parent)]:
                return BlockReport(index, BlockState.WRONG, f"{name} is not block {parent}'s")
    return BlockReport(index, BlockState.IDENTITY)


def _rule(result: Checkpoint, plan: ExpansionPlan, index: int) -> InitRule:
    inits = result.manifest.inits if result.manifest else ()
    return INITS[Init(inits[plan.layers[index].added_in_round - 1])]


def _is_zeroed(weight: Weight, name: str, rule: InitRule) -> bool:
    return is_block_norm(name) if rule.zeroes_norms else weight.row.zero_in_added


class _Zeros(Enum):
    ALL = "all +0.0"
    NEGATIVE = "all 0, some -0.0"
    NONE = "not all 0"


def _zeros(result: Checkpoint, files: SourceFiles, name: str) -> _Zeros:
    """Whether a tensor is zero, by its bits. Read again: the hash does not tell."""
    tensor = result.tensors[name]
    unsigned = numpy.dtype(f"u{result.itemsize}")
    magnitude = numpy.array((1 << (8 * result.itemsize - 1)) - 1, unsigned)
    found = {"any bit": False, "any value": False}

    def look(start: int, rows: numpy.ndarray) -> None:
        bits = rows.view(unsigned)
        found["any bit"] |= bool(bits.any())
        found["any value"] |= bool((bits & magnitude).any())

    hash_rows(StoredRows(tensor, files, result.itemsize), tensor, result.itemsize, each=look)
    if found["any value"]:
        return _Zeros.NONE
    return _Zeros.NEGATIVE if found["any bit"] else _Zeros.ALL


def _parent_in(plan: ExpansionPlan, index: int) -> int | None:
    """Where the block that a latest-round block copies now stands; None for a block of an earlier round."""
    if plan.layers[index].added_in_round != plan.num_rounds:
        return None
    there_before = [i for i, layer in enumerate(plan.layers) if layer.added_in_round < plan.num_rounds]
    return there_before[plan.layers[index].parent_layer]
