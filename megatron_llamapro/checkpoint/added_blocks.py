"""What has become of the blocks that an expansion added: identities still, trained, or neither, which is a fault."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from megatron_llamapro.checkpoint.sources import TensorSource
from megatron_llamapro.checkpoint.transforms import same_bytes
from megatron_llamapro.checkpoint.weight_map import hf_name_in_layer, weights_of
from megatron_llamapro.expansion.plan import ExpansionPlan


class BlockState(Enum):
    """What has become of an added block."""

    IDENTITY = "identity, as when added"
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


def judge_block(result: TensorSource, plan: ExpansionPlan, index: int) -> BlockReport:
    """Judge one added block by its tensors and its parent's, both in the expanded model.

    Training moves the output projections first (their gradient is the only one that is not zero at step 0), so
    zeros there mean an untrained block, which must then be its parent's copy. Only the latest round's parents are
    known; an earlier round's block is judged by its zeros alone.
    """
    weights = [weight for weight in weights_of(result.shape) if weight.layer == index]
    outputs = [name for weight in weights if weight.row.zero_in_added for name in weight.hf_names]
    others = [name for weight in weights if not weight.row.zero_in_added for name in weight.hf_names]
    parent = _parent_in(plan, index)
    all_zero = True
    for name in outputs:
        tensor = result.tensor(name)
        if torch.count_nonzero(tensor):
            all_zero = False
            if parent is not None and same_bytes(tensor, result.tensor(hf_name_in_layer(name, parent))):
                return BlockReport(index, BlockState.WRONG, f"{name} is block {parent}'s, not zero")
        elif not _is_positive_zero(tensor):
            return BlockReport(index, BlockState.WRONG, f"{name} holds -0.0, which is not the +0.0 it was given")
    if not all_zero:
        return BlockReport(index, BlockState.TRAINED)
    if parent is not None:
        for name in others:
            if not same_bytes(result.tensor(name), result.tensor(hf_name_in_layer(name, parent))):
                return BlockReport(index, BlockState.WRONG, f"{name} is not block {parent}'s")
    return BlockReport(index, BlockState.IDENTITY)


def _is_positive_zero(tensor: torch.Tensor) -> bool:
    return not torch.signbit(tensor).any()


def _parent_in(plan: ExpansionPlan, index: int) -> int | None:
    """Where the block that a latest-round block copies now stands; None for a block of an earlier round."""
    if plan.layers[index].added_in_round != plan.num_rounds:
        return None
    there_before = [i for i, layer in enumerate(plan.layers) if layer.added_in_round < plan.num_rounds]
    return there_before[plan.layers[index].parent_layer]
