"""Whether a job can run dry: what its configuration and its model decide, before torch is imported."""

from __future__ import annotations

from megatron_llamapro.checkpoint.description import DescribedModel, check_fits
from megatron_llamapro.config.checks import data_parallel_size
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RunConfig

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
