"""A model's shape and expansion plan, and whether a run can train it. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.checkpoint.formats.folders import resolve_megatron_checkpoint
from megatron_llamapro.config.checks import check_model, data_parallel_size
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.expansion.manifest import MANIFEST_NAME, Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.expansion.trainable import check_lora, check_trainable, trainable_layers, what_trains
from megatron_llamapro.expansion.trainable_part import TrainablePart
from megatron_llamapro.families.hf_config import model_shape, read_hf_config
from megatron_llamapro.families.shape import ModelShape


def check_fits(config: RunConfig, shape: ModelShape, plan: ExpansionPlan) -> None:
    """Raise `ConfigError` if a model of this shape and plan cannot be trained as configured."""
    check_shape(config, shape)
    check_trainable(config.model.trainable, plan, tie_word_embeddings=shape.tie_word_embeddings, shape=shape)
    check_lora(config.lora, plan, shape)
    trains = trainable_layers(config.model.trainable, plan, lora=config.lora)
    if config.keep.penalty_weight and trains.isdisjoint(plan.added_layers):
        raise ConfigError(
            "keep.penalty_weight is set, but no added block trains: set it to 0, or add added_blocks to model.trainable"
        )


def check_shape(config: RunConfig, shape: ModelShape) -> None:
    """Raise `ConfigError` if a model of this shape cannot be divided, or cannot read samples, as configured."""
    check_model(
        config,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        has_experts=shape.is_moe,
    )
    if config.data.seq_length > shape.max_position_embeddings:
        raise ConfigError(
            f"data.seq_length is {config.data.seq_length}, but the model supports at most "
            f"{shape.max_position_embeddings} positions"
        )


def trains_of(config: RunConfig, shape: ModelShape, plan: ExpansionPlan) -> TrainablePart:
    """Return the trainable part of the model, for estimates of its cost."""
    return what_trains(config.model.trainable, plan, tie_word_embeddings=shape.tie_word_embeddings, lora=config.lora)


@dataclass(frozen=True)
class DescribedModel:
    """The shape and the plan of a model to train."""

    shape: ModelShape
    plan: ExpansionPlan

    @classmethod
    def expanded(cls, original: ModelShape, plan: ExpansionPlan) -> DescribedModel:
        """Return the model that `plan` makes of `original`. An added block has the kind of the block that it copies."""
        return cls(original.with_layers([layer.parent_layer for layer in plan.layers]), plan)


def describe_model(checkpoint: Path, *, hf_config: Path | None, expansion: Expansion | None) -> DescribedModel:
    """Return the model of a Megatron checkpoint, or of the newest checkpoint in a run's folder.

    With `hf_config`, return instead the model that `expansion` would make of the config.json in that folder. The
    weights need not exist.

    Raises:
        LlamaProError: there is no such model.
    """
    if hf_config is not None:
        shape = model_shape(read_hf_config(hf_config))
        plan = ExpansionPlan.unexpanded(shape.num_layers)
        if expansion is not None:
            plan = expansion.expand(plan)
        return DescribedModel.expanded(shape, plan)
    if expansion is not None:
        raise ConfigError("added blocks are given, but model.checkpoint already records its own: give --hf_config")
    if not checkpoint.is_dir():
        raise ConfigError(
            f"model.checkpoint {checkpoint} does not exist: convert it first, or describe it with --hf_config FOLDER "
            "and --num_added_blocks N"
        )
    folder = checkpoint if (checkpoint / MANIFEST_NAME).is_file() else resolve_megatron_checkpoint(checkpoint)
    return DescribedModel(model_shape(read_hf_config(folder)), Manifest.read(folder).plan)


MAX_WORLD_SIZE = 4096
"""The largest world of a dry run."""


def check_runs_dry(config: RunConfig, model: DescribedModel, world_size: int) -> None:
    """Raise `ConfigError` if the job could not start, or cannot run without data."""
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ConfigError(f"--world_size is {world_size}: it must be from 1 to {MAX_WORLD_SIZE:,}")
    if model.shape.is_moe:
        raise ConfigError("a model with experts cannot run dry: the experts that a token uses depend on the data")
    data_parallel_size(config, world_size)
    check_fits(config, model.shape, model.plan)
