"""One rank's share of a run: its chunks of the model, partly frozen, the optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable import first_trainable_layer, trainable_layers
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.model.build import LlamaModel, build_model
from megatron_llamapro.model.freeze import StageReport, freeze
from megatron_llamapro.model.lora import add_adapters
from megatron_llamapro.model.penalty import penalise_added_blocks
from megatron_llamapro.model.skip_frozen import skip_frozen_work
from megatron_llamapro.optimizer.build import build_optimizer, build_scheduler
from megatron_llamapro.optimizer.replicas import skip_collectives_of_one
from megatron_llamapro.runtime.distributed import ParallelLayout, start_model_parallel


@dataclass(frozen=True)
class Machine:
    """This rank's chunks of the model, the optimizer and its schedule."""

    layout: ParallelLayout
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    report: StageReport


def build_machine(
    config: RunConfig, shape: ModelShape, plan: ExpansionPlan, *, load: Callable[[Sequence[LlamaModel]], None]
) -> Machine:
    """Build the machine on every rank of the started world. `load` fills the weights before the optimizer copies them.

    Raises:
        ConfigError: model.trainable or a parameter-group rule matches nothing in this model, or keep.penalty_weight is
            set and no added block trains.
    """
    layout = start_model_parallel(config.parallel, seed=config.training.seed)
    models = build_model(
        shape,
        model=config.model,
        parallel=config.parallel,
        precision=config.training.precision,
        recompute=config.recompute,
    )
    load(models)
    add_adapters(models, plan, config.lora, seed=config.training.seed)
    report = freeze(models, plan, config.model.trainable)
    skip_frozen_work(models, first_trainable_layer(config.model.trainable, plan, lora=config.lora))
    if config.keep.penalty_weight:
        blocks = trainable_layers(config.model.trainable, plan, lora=config.lora) & set(plan.added_layers)
        penalise_added_blocks(models, plan, weight=config.keep.penalty_weight, num_blocks=len(blocks))
    chunks = [wrapped(model, config.parallel) for model in models]
    optimizer = build_optimizer(chunks, config.optimizer, precision=config.training.precision)
    scheduler = build_scheduler(optimizer, config.optimizer, train_iters=config.training.train_iters)
    connect(
        models[0].config,
        chunks,
        optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return Machine(layout=layout, chunks=chunks, optimizer=optimizer, scheduler=scheduler, report=report)


def wrapped(model: LlamaModel, parallel: ParallelConfig) -> DistributedDataParallel:
    """Wrap the model in megatron.core's DDP, with float32 gradient buffers for trainable parameters only.

    With virtual stages, the schedule starts the gather of a whole chunk, so a bucket must not start the next one's.
    """
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            align_param_gather=parallel.virtual_pipeline_model_parallel_size is not None,
        ),
        model,
    )
    skip_collectives_of_one(ddp)
    return ddp


def connect(
    config: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    *,
    overlap_grad_reduce: bool,
    overlap_param_gather: bool,
) -> None:
    """Tell megatron.core's schedules how to scale, synchronise and finalise gradients."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if overlap_grad_reduce:
        no_syncs = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_syncs if len(chunks) > 1 else no_syncs[0]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks] if len(chunks) > 1 else None
    if overlap_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks] if len(chunks) > 1 else None
