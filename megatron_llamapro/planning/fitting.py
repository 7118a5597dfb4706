"""Whether a model can be trained as configured, and the job that it makes for planning. Needs no torch."""

from __future__ import annotations

from megatron_llamapro.checkpoint.described import DescribedModel
from megatron_llamapro.config.checks import check_model, data_parallel_size
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.model.trainable import check_lora, check_trainable, what_trains
from megatron_llamapro.pipeline.cost import Trains
from megatron_llamapro.pipeline.job import Job
from megatron_llamapro.pipeline.memory import Division
from megatron_llamapro.pipeline.timing import time_from_flops

_ITEMSIZE = {"bf16": 2, "fp32": 4}


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


MAX_WORLD_SIZE = 4096
"""Of a dry run."""


def check_runs_dry(config: RunConfig, model: DescribedModel, world_size: int) -> None:
    """Raise `ConfigError` where the job could not start, or cannot run without data."""
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ConfigError(f"--world_size is {world_size}: it is from 1 to {MAX_WORLD_SIZE:,}")
    if model.shape.is_moe:
        raise ConfigError(
            "a model with experts cannot run dry: which of them a token goes through is known from data only"
        )
    data_parallel_size(config, world_size)
    check_fits(config, model.shape, model.plan)


def trains_of(config: RunConfig, shape: ModelShape, plan: ExpansionPlan) -> Trains:
    """What trains, for the arithmetic."""
    return what_trains(config.model.trainable, plan, tie_word_embeddings=shape.tie_word_embeddings, lora=config.lora)


def division_of(config: RunConfig, world_size: int) -> Division:
    """How a job of so many ranks divides model and batch, without the pipeline. Errors of `data_parallel_size`."""
    return Division(
        tensor_size=config.parallel.tensor_model_parallel_size,
        data_size=data_parallel_size(config, world_size),
        sequence_parallel=config.parallel.sequence_parallel,
        micro_batch_size=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
        itemsize=_ITEMSIZE[config.training.precision],
    )


def job_of(
    config: RunConfig,
    shape: ModelShape,
    plan: ExpansionPlan,
    *,
    world_size: int,
    flops_per_second: float,
    memory_bytes: float = float("inf"),
) -> Job:
    """The job that `config` describes, its times by arithmetic: `flops_per_second` is what a rank really reaches."""
    trains, division = trains_of(config, shape, plan), division_of(config, world_size)
    samples = config.training.micro_batch_size * division.data_size
    return Job(
        shape=shape,
        trains=trains,
        division=division,
        time=time_from_flops(shape, trains, division, flops_per_second=flops_per_second),
        num_stages=config.parallel.pipeline_model_parallel_size,
        num_chunks=config.parallel.virtual_pipeline_model_parallel_size or 1,
        num_microbatches=config.training.global_batch_size // samples,
        recompute=config.recompute,
        memory_bytes=memory_bytes,
    )
