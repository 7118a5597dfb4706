"""What trains: the added blocks of an expansion plan, of all rounds or some, and whatever else is named. Everything
else is frozen.

By global layer index and before DDP wraps the model: DDP's gradient buffers and the optimizer then never see a
frozen parameter. Usable with any megatron.core GPTModel; see docs/in_your_own_loop.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.names import NamedParameter, named_parameters
from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.pipeline.cost import Trains

ADDED_BLOCKS = "added_blocks"
NEWEST_BLOCKS = "newest_blocks"
EVERYTHING = "everything"

# Parts outside the blocks: what a user names -> the start of its parameters' names.
OUTSIDE_PARTS = {
    "embedding": "embedding.",
    "final_norm": "decoder.final_layernorm.",
    "output_layer": "output_layer.",
}

_ROUND = re.compile(r"round_([1-9]\d*)")


@dataclass(frozen=True)
class BlockPart:
    """A part of the added blocks that can be named by itself."""

    patterns: tuple[str, ...]
    """Parts of its parameters' names, ours and Transformer Engine's."""
    needs: str | None = None
    """The field (or property) of ModelShape without which a model has no such part."""


BLOCK_PARTS = {
    "linear_qkv": BlockPart((".linear_qkv.weight", ".linear_qkv.bias")),
    "linear_proj": BlockPart((".linear_proj.weight", ".linear_proj.bias")),
    "linear_fc1": BlockPart((".linear_fc1.weight", ".linear_fc1.bias")),
    "linear_fc2": BlockPart((".linear_fc2.weight", ".linear_fc2.bias")),
    "input_layernorm": BlockPart((".input_layernorm.", ".linear_qkv.layer_norm_weight")),
    "pre_mlp_layernorm": BlockPart((".pre_mlp_layernorm.", ".linear_fc1.layer_norm_weight")),
    "q_layernorm": BlockPart((".q_layernorm.",), needs="qk_layernorm"),
    "k_layernorm": BlockPart((".k_layernorm.",), needs="qk_layernorm"),
    "router": BlockPart((".mlp.router.",), needs="is_moe"),
    "experts": BlockPart((".mlp.experts.",), needs="is_moe"),
}

TRAINABLE_CHOICES = (ADDED_BLOCKS, NEWEST_BLOCKS, EVERYTHING, *OUTSIDE_PARTS, *BLOCK_PARTS)
"""Beside these, round_1, round_2, …: the blocks that one round added."""


@dataclass(frozen=True)
class StageReport:
    """What trains on one rank's stage."""

    num_layers: int
    trainable_layers: tuple[int, ...]
    """Global layers with at least one trainable parameter."""
    num_parameters: int
    """Of this rank."""
    num_trainable: int
    """Of this rank."""
    num_stage_parameters: int
    """Of all tensor-parallel ranks of the stage, each counted once, with padding of the vocabulary; the last stage's
    copy of a tied embedding is left out."""
    num_stage_trainable: int
    """Of all tensor-parallel ranks of the stage, each counted once."""
    weight_bytes: int
    gradient_bytes: int
    """float32 gradient buffers of trainable parameters."""
    optimizer_bytes: int
    """float32 moments, and float32 master weights where the weights are not float32; before any division over
    data-parallel ranks."""


def check_trainable(
    trainable: Sequence[str],
    plan: ExpansionPlan,
    *,
    tie_word_embeddings: bool,
    shape: ModelShape | None = None,
) -> None:
    """Raise `ConfigError` where `trainable` names what is not there; parts of blocks are looked for in `shape`."""
    for choice in trainable:
        chosen_round = _ROUND.fullmatch(choice)
        if choice not in TRAINABLE_CHOICES and chosen_round is None:
            nearest = difflib.get_close_matches(choice, (*TRAINABLE_CHOICES, *_rounds(plan)), n=1)
            choices = ", ".join((*TRAINABLE_CHOICES, "round_1, round_2, …"))
            hint = f": did you mean '{nearest[0]}'?" if nearest else f": it is one of {choices}"
            raise ConfigError(f"model.trainable names '{choice}', which is nothing that can train{hint}")
        is_outside = choice == EVERYTHING or choice in OUTSIDE_PARTS
        if not is_outside and not plan.added_layers:
            raise ConfigError(
                f"model.trainable names '{choice}', but the checkpoint has no added blocks: expand it first "
                "(tools/convert_checkpoint.py --num_added_blocks N), or set model.trainable to [everything]"
            )
        if chosen_round is not None and choice not in _rounds(plan):
            raise ConfigError(
                f"model.trainable names '{choice}', but the checkpoint was expanded in {plan.num_rounds} "
                f"round{'s' * (plan.num_rounds > 1)}: it has {', '.join(_rounds(plan))}"
            )
        if choice == "output_layer" and tie_word_embeddings:
            raise ConfigError(
                "model.trainable names 'output_layer', which this model ties to its embedding: name 'embedding'"
            )
        needs = BLOCK_PARTS[choice].needs if choice in BLOCK_PARTS else None
        if shape is not None and needs is not None and not getattr(shape, needs):
            raise ConfigError(f"model.trainable names '{choice}', which the blocks of this model do not have")


def _rounds(plan: ExpansionPlan) -> list[str]:
    return [f"round_{number}" for number in range(1, plan.num_rounds + 1)]


def trainable_blocks(trainable: Sequence[str], plan: ExpansionPlan) -> frozenset[int]:
    """Layers that `trainable` names as whole blocks: those added in any of its rounds."""
    rounds = {int(found.group(1)) for found in map(_ROUND.fullmatch, trainable) if found}
    if NEWEST_BLOCKS in trainable:
        rounds.add(plan.num_rounds)
    if ADDED_BLOCKS in trainable:
        rounds.update(range(1, plan.num_rounds + 1))
    return frozenset(i for i, layer in enumerate(plan.layers) if layer.added_in_round in rounds - {0})


def trainable_layers(trainable: Sequence[str], plan: ExpansionPlan) -> frozenset[int]:
    """Layers in which anything trains."""
    if EVERYTHING in trainable:
        return frozenset(range(plan.num_layers))
    if any(choice in BLOCK_PARTS for choice in trainable):
        return frozenset(plan.added_layers)
    return trainable_blocks(trainable, plan)


def what_trains(trainable: Sequence[str], plan: ExpansionPlan, *, tie_word_embeddings: bool) -> Trains:
    """The same for the arithmetic of pipeline/cost.py: layers with anything in them that trains, and the two ends."""
    embedding = EVERYTHING in trainable or "embedding" in trainable
    output_layer = EVERYTHING in trainable or "output_layer" in trainable or (embedding and tie_word_embeddings)
    return Trains(trainable_layers(trainable, plan), embedding, output_layer)


def first_trainable_layer(trainable: Sequence[str], plan: ExpansionPlan) -> int:
    """The first layer that a backward pass must reach: -1 where it must reach the embedding, `plan.num_layers` where
    only the final norm or the head trains."""
    if EVERYTHING in trainable or "embedding" in trainable:
        return -1
    return min(trainable_layers(trainable, plan), default=plan.num_layers)


def freeze(
    chunks: Iterable[torch.nn.Module],
    plan: ExpansionPlan,
    trainable: Sequence[str] = (ADDED_BLOCKS,),
    *,
    tie_word_embeddings: bool = False,
    tensor_size: int = 1,
) -> StageReport:
    """Set `requires_grad` of every parameter of this rank's model chunks, and report what trains.

    `trainable` holds names out of `TRAINABLE_CHOICES`, or of rounds; `tensor_size` is the tensor-parallel size, for
    the report's totals. Call it before DDP wraps the chunks.

    Raises:
        ConfigError: a name that is nothing, or that this model does not have.
    """
    check_trainable(trainable, plan, tie_word_embeddings=tie_word_embeddings)
    parameters = list(named_parameters(chunks))
    blocks, added = trainable_blocks(trainable, plan), frozenset(plan.added_layers)
    for named in parameters:
        trains = named.layer in blocks or _trains_by_name(named, trainable, added, tie_word_embeddings)
        named.parameter.requires_grad_(trains)
    return stage_report(parameters, tensor_size=tensor_size)


def _trains_by_name(named: NamedParameter, trainable: Sequence[str], added: Collection[int], tied: bool) -> bool:
    if EVERYTHING in trainable:
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
    """Counts and bytes of what trains among one rank's parameters."""

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
    """Whether tensor-parallel ranks hold different parts of it, by megatron.core's mark."""
    return getattr(parameter, "tensor_model_parallel", False)


def _is_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether it is the last stage's copy of a tied embedding, by megatron.core's mark."""
    return getattr(parameter, "shared", False)
