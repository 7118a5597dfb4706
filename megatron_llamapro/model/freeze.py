"""Freezes everything but the trainable part: the added blocks of an expansion plan, of all rounds or some, and other
parts by name.

Blocks are chosen by global layer index, before DDP wraps the model. DDP's gradient buffers and the optimizer then
never see a frozen parameter. Works with any megatron.core GPTModel; see docs/in_your_own_loop.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable import (
    ADDED_BLOCKS,
    BLOCK_PARTS,
    EVERYTHING,
    LORA,
    OUTSIDE_PARTS,
    check_trainable,
    is_adapter,
    trainable_blocks,
)
from megatron_llamapro.model.names import NamedParameter, named_parameters, unwrapped


@dataclass(frozen=True)
class StageReport:
    """Sizes of one rank's stage and of its trainable part."""

    num_layers: int
    trainable_layers: tuple[int, ...]
    """Global layers with at least one trainable parameter."""
    num_parameters: int
    """On this rank."""
    num_trainable: int
    """On this rank."""
    num_stage_parameters: int
    """On all tensor-parallel ranks of the stage, each counted once. Includes the vocabulary's padding, but not the
    last stage's copy of a tied embedding."""
    num_stage_trainable: int
    """On all tensor-parallel ranks of the stage, each counted once."""
    weight_bytes: int
    gradient_bytes: int
    """float32 gradient buffers of trainable parameters."""
    optimizer_bytes: int
    """float32 moments, and float32 master weights if the weights are not float32, before sharding over data-parallel
    ranks."""


def freeze(
    chunks: Iterable[torch.nn.Module],
    plan: ExpansionPlan,
    trainable: Sequence[str] = (ADDED_BLOCKS,),
    *,
    tie_word_embeddings: bool | None = None,
    tensor_size: int | None = None,
) -> StageReport:
    """Set `requires_grad` on every parameter of this rank's model chunks, and report the trainable part.

    `trainable` holds names from `TRAINABLE_CHOICES` or names of rounds. `tie_word_embeddings` and `tensor_size`, which
    the report's totals need, are the model's own unless given. Call this function before DDP wraps the chunks.

    Raises:
        ConfigError: a name is unknown, or names a part that this model does not have.
    """
    chunks = list(chunks)
    models = [unwrapped(chunk) for chunk in chunks]
    if tie_word_embeddings is None:
        tie_word_embeddings = any(model.share_embeddings_and_output_weights for model in models)
    if tensor_size is None:
        tensor_size = max((model.config.tensor_model_parallel_size for model in models), default=1)
    check_trainable(trainable, plan, tie_word_embeddings=tie_word_embeddings)
    parameters = list(named_parameters(chunks))
    blocks, added = trainable_blocks(trainable, plan), frozenset(plan.added_layers)
    for named in parameters:
        trains = named.layer in blocks or _trains_by_name(named, trainable, added, tie_word_embeddings)
        named.parameter.requires_grad_(trains)
    return stage_report(parameters, tensor_size=tensor_size)


def _trains_by_name(named: NamedParameter, trainable: Sequence[str], added: Collection[int], tied: bool) -> bool:
    if EVERYTHING in trainable or (LORA in trainable and is_adapter(named.name)):
        return True
    if named.layer is None:
        parts = [OUTSIDE_PARTS[choice] for choice in trainable if choice in OUTSIDE_PARTS]
        if tied and "embedding" in trainable:
            parts.append(OUTSIDE_PARTS["output_layer"])  # the last stage's copy of the embedding
        return named.name.startswith(tuple(parts)) if parts else False
    if named.layer not in added:
        return False
    parts = [BLOCK_PARTS[choice] for choice in trainable if choice in BLOCK_PARTS]
    return any(pattern in named.name for part in parts for pattern in part.patterns)


def stage_report(parameters: Sequence[NamedParameter], *, tensor_size: int = 1) -> StageReport:
    """Return the sizes of one rank's parameters and of the trainable ones among them."""

    def on_stage(some: Sequence[NamedParameter]) -> int:
        counted = (x.parameter for x in some if not _is_copy(x.parameter))
        return sum(parameter.numel() * (tensor_size if is_divided(parameter) else 1) for parameter in counted)

    training = [named for named in parameters if named.parameter.requires_grad]
    num_trainable = sum(named.parameter.numel() for named in training)
    masters = sum(named.parameter.numel() for named in training if named.parameter.dtype != torch.float32)
    return StageReport(
        num_layers=len({named.layer for named in parameters if named.layer is not None}),
        trainable_layers=tuple(sorted({named.layer for named in training if named.layer is not None})),
        num_parameters=sum(named.parameter.numel() for named in parameters),
        num_trainable=num_trainable,
        num_stage_parameters=on_stage(parameters),
        num_stage_trainable=on_stage(training),
        weight_bytes=sum(named.parameter.numel() * named.parameter.element_size() for named in parameters),
        gradient_bytes=4 * num_trainable,
        optimizer_bytes=8 * num_trainable + 4 * masters,
    )


def is_divided(parameter: torch.nn.Parameter) -> bool:
    """Return whether tensor-parallel ranks hold different parts of the parameter, by megatron.core's mark."""
    return getattr(parameter, "tensor_model_parallel", False)


def _is_copy(parameter: torch.nn.Parameter) -> bool:
    """Return whether the parameter is the last stage's copy of a tied embedding, by megatron.core's mark."""
    return getattr(parameter, "shared", False)
