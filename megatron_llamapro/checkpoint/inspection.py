"""Describes a checkpoint from its small files and headers. No tensor is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.tensors.weight_map import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_LAYER,
    Weight,
    iter_hf,
    weights_of,
)
from megatron_llamapro.config.pipeline_stages import draw
from megatron_llamapro.config.values import decimal_size
from megatron_llamapro.expansion.dial_record import DialRecord
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.provenance import ComposedPack
from megatron_llamapro.families.hf_config import ITEMSIZES
from megatron_llamapro.families.shape import ModelShape


@dataclass(frozen=True)
class ModelPart:
    """The size of a part of a model."""

    name: str
    num_parameters: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.num_parameters:,} parameters, {decimal_size(self.num_bytes)}"


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint."""

    folder: Path
    format: str
    family: str
    dtype: str
    shape: ModelShape
    plan: ExpansionPlan
    source: str | None
    """Name of the first source model; None without a manifest."""
    parts: tuple[ModelPart, ...]
    division: str | None = None
    """How it is divided over ranks, if its format fixes that."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of every (virtual) stage, if its format fixes that."""
    base: Path | None = None
    """The folder with the frozen weights of a delta checkpoint."""
    num_base_tensors: int = 0
    other_dtypes: Mapping[str, str] = field(default_factory=dict)
    """The types of the tensors that are not stored in `dtype`, by name."""
    packs: tuple[ComposedPack, ...] = ()
    """The packs that rounds of blocks came from."""
    averaged: tuple[str, ...] = ()
    """The names of the checkpoints that it, or the model that it was trained from, is the mean of."""
    num_adapters: int = 0
    """The number of low-rank adapters stored beside the weights. Every reader merges them."""
    dial: DialRecord | None = None
    """How the checkpoint was dialed, or None."""

    @property
    def trains(self) -> str:
        """The part that trains unless a run's configuration says otherwise."""
        added = next(part for part in self.parts if part.name == "added blocks")
        if not added.num_parameters:
            return "no blocks are added yet: add blocks first, or train everything"
        total = sum(part.num_parameters for part in self.parts)
        share = f"{100 * added.num_parameters / total:.1f} %"
        return f"added blocks: {added.num_parameters:,} of {total:,} parameters ({share})"

    def to_json(self) -> dict:
        """Return plain data for JSON."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "family": self.family,
            "dtype": self.dtype,
            "other_dtypes": dict(self.other_dtypes),
            "shape": asdict(self.shape),
            "source": self.source,
            "num_layers": self.plan.num_layers,
            "added_layers": list(self.plan.added_layers),
            "plan": self.plan.to_json(),
            "parts": [asdict(part) for part in self.parts],
            "trains": self.trains,
            "division": self.division,
            "stage_layers": self.stage_layers,
            "base": str(self.base) if self.base else None,
            "adapters": self.num_adapters,
            "averaged": list(self.averaged),
            "packs": [asdict(pack) for pack in self.packs],
            "dial": self.dial.to_json() if self.dial else None,
        }

    def __str__(self) -> str:
        size = self.shape
        rows = [
            ("folder", f"{self.folder} ({self.format})"),
            *([("adapters", f"{self.num_adapters} low-rank; every tool merges them")] if self.num_adapters else []),
            *([("packs", ", ".join(map(str, self.packs)))] if self.packs else []),
            *([("mean of", ", ".join(self.averaged))] if self.averaged else []),
            *([("dialed", f"{self.dial} ({len(self.dial.undialed_hashes)} tensors)")] if self.dial else []),
            *([("delta of", f"{self.base}, for {self.num_base_tensors} tensors")] if self.base else []),
            (
                "family",
                f"{self.family}, {self._types}" + (f", made from {self.source}" if self.source else ""),
            ),
            ("layers", f"{self.plan.num_layers}, of which {len(self.plan.added_layers)} added"),
            ("plan", drawing(self.plan, tie_word_embeddings=size.tie_word_embeddings)),
            ("", legend(self.plan)),
            *self._stages(),
            ("trains", self.trains),
            (
                "shape",
                f"hidden {size.hidden_size}, feed-forward {size.ffn_hidden_size}, vocabulary {size.vocab_size}",
            ),
            (
                "heads",
                f"{size.num_attention_heads} in {size.num_query_groups} groups of {size.kv_channels} channels",
            ),
            *_particulars(size),
            *((part.name, str(part)) for part in self.parts),
        ]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)

    @property
    def _types(self) -> str:
        others = sorted(set(self.other_dtypes.values()))
        if not others:
            return self.dtype
        count = len(self.other_dtypes)
        tensors = f"{count} tensor{'s' * (count > 1)} of {' and '.join(others)}"
        return f"{self.dtype}, but {tensors} (give --dtype to convert it)"

    def _stages(self) -> list[tuple[str, str]]:
        """Return rows that show which blocks each stage holds."""
        if self.stage_layers is None:
            return []
        return [("ranks", str(self.division)), ("", draw(self.stage_layers, set(self.plan.added_layers)))]


def _particulars(shape: ModelShape) -> list[tuple[str, str]]:
    """Return rows for features that only some families have."""
    rows = []
    if shape.is_moe:
        rows.append(("experts", f"{shape.num_moe_experts} per block, {shape.moe_router_topk} per token"))
    if shape.window_size is not None:
        windowed = [layer for layer in range(shape.num_layers) if shape.window_of(layer)]
        where = "every layer" if len(windowed) == shape.num_layers else f"layers {', '.join(map(str, windowed))}"
        rows.append(("window", f"{shape.window_size[0] + 1} tokens in {where}"))
    if shape.add_bias_linear:
        rows.append(("biases", "of all projections"))
    extras = {
        "biases of queries, keys and values": shape.add_qkv_bias and not shape.add_bias_linear,
        "norms of queries and keys": shape.qk_layernorm,
    }
    present = [text for text, there in extras.items() if there]
    return [*rows, ("attention", ", ".join(present))] if present else rows


def inspect(folder: Path) -> Inspection:
    """Describe a checkpoint of any format. Of a training run's folder, the newest checkpoint is described.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    checkpoint = open_checkpoint(folder)
    plan = checkpoint.plan
    return Inspection(
        folder=checkpoint.folder,
        format=checkpoint.format.value,
        family=checkpoint.config["model_type"],
        dtype=checkpoint.dtype,
        other_dtypes=checkpoint.other_dtypes,
        shape=checkpoint.shape,
        plan=plan,
        source=checkpoint.manifest.source.name if checkpoint.manifest else None,
        division=checkpoint.division,
        stage_layers=checkpoint.stage_layers,
        base=checkpoint.base.folder if checkpoint.base else None,
        num_adapters=checkpoint.num_adapters,
        packs=checkpoint.manifest.packs if checkpoint.manifest else (),
        averaged=tuple(each.name for each in checkpoint.manifest.averaged) if checkpoint.manifest else (),
        dial=checkpoint.manifest.dial if checkpoint.manifest else None,
        num_base_tensors=len(checkpoint.base.delta.base_hashes) if checkpoint.base else 0,
        parts=tuple(_part(name, belongs, checkpoint) for name, belongs in _PARTS.items()),
    )


_PARTS: dict[str, Callable[[Weight, ExpansionPlan], bool]] = {
    "embedding": lambda weight, plan: weight.row is EMBEDDING,
    "original blocks": lambda weight, plan: weight.layer is not None and not plan.layers[weight.layer].is_added,
    "added blocks": lambda weight, plan: weight.layer is not None and plan.layers[weight.layer].is_added,
    "final norm": lambda weight, plan: weight.row is FINAL_NORM,
    "output layer": lambda weight, plan: weight.row is OUTPUT_LAYER,
}


def _part(name: str, belongs: Callable[[Weight, ExpansionPlan], bool], checkpoint: Checkpoint) -> ModelPart:
    weights = [weight for weight in weights_of(checkpoint.shape) if belongs(weight, checkpoint.plan)]
    sizes = {name: math.prod(size) for _, name, size in iter_hf(weights)}
    num_bytes = sum(ITEMSIZES[checkpoint.dtype_of(name)] * size for name, size in sizes.items())
    return ModelPart(name, sum(sizes.values()), num_bytes)


def drawing(plan: ExpansionPlan, *, tie_word_embeddings: bool) -> str:
    """Return the model as one line of letters: E o o A o o A H."""
    blocks = [_letter(plan, layer.added_in_round) for layer in plan.layers]
    return " ".join(["E", *blocks, "E" if tie_word_embeddings else "H"])


def legend(plan: ExpansionPlan) -> str:
    """Return the meaning of the letters of `drawing`."""
    rounds = range(1, plan.num_rounds + 1)
    added = [f"{_letter(plan, number)} added" + (f" in round {number}" if len(rounds) > 1 else "") for number in rounds]
    return ", ".join(["E embedding", "o original block", *added, "H head"])


def _letter(plan: ExpansionPlan, added_in_round: int) -> str:
    """Return o for an original block, A for an added one, or the number of its round if there are several."""
    if added_in_round == 0:
        return "o"
    return "A" if plan.num_rounds == 1 else str(added_in_round)
