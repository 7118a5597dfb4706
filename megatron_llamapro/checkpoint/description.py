"""A model by its shape and expansion plan, and whether a run can train it. No weights are read."""

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
from megatron_llamapro.expansion.trainable import check_lora, check_trainable, what_trains
from megatron_llamapro.expansion.trains import Trains
from megatron_llamapro.families.hf_config import model_shape, read_hf_config
from megatron_llamapro.families.shape import ModelShape


def check_fits(config: RunConfig, shape: ModelShape, plan: ExpansionPlan) -> None:
    """Raise `ConfigError` where a model of this shape and plan cannot be trained as configured."""
    check_model(
        config,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        has_experts=shape.is_moe,
    )
    check_trainable(config.model.trainable, plan, tie_word_embeddings=shape.tie_word_embeddings, shape=shape)
    check_lora(config.lora, plan, shape)
    if config.data.seq_length > shape.max_position_embeddings:
        raise ConfigError(
            f"data.seq_length is {config.data.seq_length}, but the model was made for at most "
            f"{shape.max_position_embeddings} positions"
        )


def trains_of(config: RunConfig, shape: ModelShape, plan: ExpansionPlan) -> Trains:
    """What trains, for the arithmetic."""
    return what_trains(config.model.trainable, plan, tie_word_embeddings=shape.tie_word_embeddings, lora=config.lora)


@dataclass(frozen=True)
class DescribedModel:
    """What is trained."""

    shape: ModelShape
    plan: ExpansionPlan

    @classmethod
    def expanded(cls, original: ModelShape, plan: ExpansionPlan) -> DescribedModel:
        """What `plan` makes of a model; each added block is of the kind of the one that it copies."""
        return cls(original.with_layers([layer.parent_layer for layer in plan.layers]), plan)


def describe_model(checkpoint: Path, *, hf_config: Path | None, expansion: Expansion | None) -> DescribedModel:
    """The model of a Megatron checkpoint (or of a run's newest), or with `hf_config` the one that `expansion` would
    make of the model whose config.json that folder has. The weights need not be there.

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
        raise ConfigError("added blocks are asked for, but model.checkpoint says itself which it has: give --hf_config")
    if not checkpoint.is_dir():
        raise ConfigError(
            f"model.checkpoint {checkpoint} is not there: convert it first, or describe it by --hf_config FOLDER and "
            "--num_added_blocks N"
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
        raise ConfigError("a model with experts cannot run dry: only data decides which experts a token goes through")
    data_parallel_size(config, world_size)
    check_fits(config, model.shape, model.plan)
