"""The parts of a model that can train, by name: added blocks of all rounds or some, other parts, and adapters.

Pure: `freeze.py` and `lora.py` apply it to a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import LoraConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable_part import Adapters, TrainablePart
from megatron_llamapro.families.shape import ModelShape

ADDED_BLOCKS = "added_blocks"
NEWEST_BLOCKS = "newest_blocks"
EVERYTHING = "everything"
LORA = "lora"

LORA_A, LORA_B = ".lora_a", ".lora_b"
"""Ends of the names of an adapter's two matrices."""

# Parts outside the blocks: what a user names -> the start of its parameters' names.
OUTSIDE_PARTS = {
    "embedding": "embedding.",
    "final_norm": "decoder.final_layernorm.",
    "output_layer": "output_layer.",
}

NO_ADAPTERS = LoraConfig()

# Linears that can have an adapter -> the module of a block that holds them.
ADAPTER_OWNERS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}

_ROUND = re.compile(r"round_([1-9]\d*)")


@dataclass(frozen=True)
class BlockPart:
    """A part of the added blocks that has a name of its own."""

    patterns: tuple[str, ...]
    """Substrings of its parameters' names, in our layers and in Transformer Engine's."""
    needs: str | None = None
    """A field or property of ModelShape. A model has the part only if it is true."""


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

TRAINABLE_CHOICES = (ADDED_BLOCKS, NEWEST_BLOCKS, EVERYTHING, LORA, *OUTSIDE_PARTS, *BLOCK_PARTS)
"""Other choices are round_1, round_2, …: the blocks that one round added."""


def check_trainable(
    trainable: Sequence[str],
    plan: ExpansionPlan,
    *,
    tie_word_embeddings: bool,
    shape: ModelShape | None = None,
) -> None:
    """Raise `ConfigError` if `trainable` names a part that does not exist. `shape` tells which parts blocks have."""
    for choice in trainable:
        chosen_round = _ROUND.fullmatch(choice)
        if choice not in TRAINABLE_CHOICES and chosen_round is None:
            nearest = difflib.get_close_matches(choice, (*TRAINABLE_CHOICES, *_rounds(plan)), n=1)
            choices = ", ".join((*TRAINABLE_CHOICES, "round_1, round_2, …"))
            hint = f": did you mean '{nearest[0]}'?" if nearest else f": it is one of {choices}"
            raise ConfigError(f"model.trainable names '{choice}', which is not a trainable part{hint}")
        needs_added = choice not in (EVERYTHING, LORA, *OUTSIDE_PARTS)
        if needs_added and not plan.added_layers:
            raise ConfigError(
                f"model.trainable names '{choice}', but the checkpoint has no added blocks: expand it first "
                "(llamapro convert … --num_added_blocks N), or set model.trainable to [everything]"
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
    """Return the layers that `trainable` names as whole blocks: those added in any of its rounds."""
    rounds = {int(found.group(1)) for found in map(_ROUND.fullmatch, trainable) if found}
    if NEWEST_BLOCKS in trainable:
        rounds.add(plan.num_rounds)
    if ADDED_BLOCKS in trainable:
        rounds.update(range(1, plan.num_rounds + 1))
    return frozenset(i for i, layer in enumerate(plan.layers) if layer.added_in_round in rounds - {0})


def trainable_layers(
    trainable: Sequence[str], plan: ExpansionPlan, *, lora: LoraConfig = NO_ADAPTERS
) -> frozenset[int]:
    """Return the layers in which anything trains."""
    if EVERYTHING in trainable:
        return frozenset(range(plan.num_layers))
    layers = trainable_blocks(trainable, plan)
    if any(choice in BLOCK_PARTS for choice in trainable):
        layers |= frozenset(plan.added_layers)
    return layers | adapted_layers(lora, plan) if LORA in trainable else layers


def what_trains(
    trainable: Sequence[str], plan: ExpansionPlan, *, tie_word_embeddings: bool, lora: LoraConfig = NO_ADAPTERS
) -> TrainablePart:
    """Return the trainable part of the model for planning/flops.py: parts of each layer, embedding, norm and head."""
    everything = EVERYTHING in trainable
    embedding = everything or "embedding" in trainable
    layers, whole = trainable_layers(trainable, plan, lora=lora), trainable_blocks(trainable, plan)
    named = frozenset(trainable) & frozenset(BLOCK_PARTS)
    in_part = frozenset() if everything else layers - whole
    adapters = None
    if LORA in trainable and lora.rank is not None:
        adapters = Adapters(adapted_layers(lora, plan), lora.rank, frozenset(lora.targets))
    return TrainablePart(
        layers,
        embedding=embedding,
        output_layer=everything or "output_layer" in trainable or (embedding and tie_word_embeddings),
        final_norm=everything or "final_norm" in trainable,
        parts={layer: named if layer in plan.added_layers else frozenset() for layer in in_part},
        adapters=adapters,
    )


def first_trainable_layer(trainable: Sequence[str], plan: ExpansionPlan, *, lora: LoraConfig = NO_ADAPTERS) -> int:
    """Return the first layer that a backward pass must reach: -1 if it must reach the embedding, `plan.num_layers` if
    only the final norm or the head trains."""
    if EVERYTHING in trainable or "embedding" in trainable:
        return -1
    return min(trainable_layers(trainable, plan, lora=lora), default=plan.num_layers)


def adapted_layers(lora: LoraConfig, plan: ExpansionPlan) -> frozenset[int]:
    """Return the global layers whose linears get adapters."""
    if lora.rank is None:
        return frozenset()
    added, every = frozenset(plan.added_layers), frozenset(range(plan.num_layers))
    return {"originals": every - added, "added_blocks": added, "all": every}[lora.blocks]


def check_lora(lora: LoraConfig, plan: ExpansionPlan, shape: ModelShape) -> None:
    """Raise `ConfigError` if the model lacks the layers or linears that adapters are configured for."""
    if lora.rank is None:
        return
    if not adapted_layers(lora, plan):
        raise ConfigError(
            f"lora.blocks is {lora.blocks}, but the checkpoint has no added blocks: expand it first "
            "(llamapro convert … --num_added_blocks N), or set lora.blocks to originals"
        )
    in_experts = [target for target in lora.targets if shape.is_moe and ADAPTER_OWNERS[target] == "mlp"]
    if in_experts:
        raise ConfigError(
            f"lora.targets names '{in_experts[0]}', which lies in this model's experts: name linear_qkv and linear_proj"
        )


def is_adapter(name: str) -> bool:
    """Return whether the name of a parameter, or its key in a checkpoint, belongs to an adapter."""
    return name.endswith((LORA_A, LORA_B))
