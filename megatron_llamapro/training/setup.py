"""Everything a run is built from, in order: checks, model, what trains, optimizer, data, and where it continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from megatron_llamapro.checkpoint.adapters import AdapterRecord
from megatron_llamapro.checkpoint.carried import carried_files
from megatron_llamapro.checkpoint.manifest import Manifest
from megatron_llamapro.checkpoint.megatron_dist import check_loadable
from megatron_llamapro.config.checks import data_parallel_size
from megatron_llamapro.config.errors import CheckpointError, ConfigError, DataError, LlamaProError
from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.data.dataset import CheckedDataset, build_train_dataset, build_valid_datasets, check_train_files
from megatron_llamapro.data.tokenizer import Tokenizer, load_tokenizer
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.build import LlamaModel, build_model
from megatron_llamapro.model.families import model_shape, read_hf_config
from megatron_llamapro.model.freeze import StageReport, freeze
from megatron_llamapro.model.frozen import skip_frozen_work
from megatron_llamapro.model.lora import add_adapters
from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.model.spec import uses_transformer_engine
from megatron_llamapro.model.trainable import first_trainable_layer
from megatron_llamapro.optimizer.build import build_optimizer, build_scheduler, check_apex
from megatron_llamapro.planning.fitting import check_fits
from megatron_llamapro.runtime.distributed import ParallelLayout, from_first_rank, raise_together, start_model_parallel
from megatron_llamapro.training.checkpointing import load_checkpoint, load_model
from megatron_llamapro.training.metrics import metrics_path
from megatron_llamapro.training.replicas import skip_collectives_of_one
from megatron_llamapro.training.resume import RunIdentity, checkpoint_to_resume, run_identity, starting_checkpoint
from megatron_llamapro.training.state import TrainingState
from megatron_llamapro.training.step import connect

_MANIFEST_DTYPE = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Source:
    """What a run starts from, as far as small files tell: the model, its tokenizer, the data, and where it was."""

    folder: Path
    manifest: Manifest
    shape: ModelShape
    tokenizer: Tokenizer
    held_out: Mapping[str, Dataset]
    identity: RunIdentity
    resume_from: Path | None
    """The run's own newest checkpoint, where it was started before."""


@dataclass(frozen=True)
class Machine:
    """What computes on this rank: its part of the model, the optimizer and its schedule."""

    layout: ParallelLayout
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    report: StageReport


@dataclass(frozen=True)
class Run:
    """A run that is ready to train. Only `state` (and the tensors) change from here on."""

    config: RunConfig
    layout: ParallelLayout
    source: Source
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    train_set: CheckedDataset
    report: StageReport
    state: TrainingState

    @property
    def num_microbatches(self) -> int:
        """Micro-batches a replica runs in a step."""
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.layout.data_size)


def set_up(config: RunConfig) -> Run:
    """Build the run on every rank of the started world, or raise the same error on all of them.

    Raises:
        LlamaProError: anything in the configuration, the checkpoint or the data that cannot be trained with.
    """
    source = _checked_source(config)

    def load(models: Sequence[LlamaModel]) -> None:
        if source.resume_from is None:
            load_model(models, source.folder)

    machine = build_machine(config, source.shape, source.manifest.plan, load=load)
    state = TrainingState()
    if source.resume_from is not None:
        state = load_checkpoint(
            source.resume_from,
            chunks=machine.chunks,
            optimizer=machine.optimizer,
            scheduler=machine.scheduler,
        )
    return Run(
        config=config,
        layout=machine.layout,
        source=source,
        chunks=machine.chunks,
        optimizer=machine.optimizer,
        scheduler=machine.scheduler,
        train_set=_train_set(config, source),
        report=machine.report,
        state=state,
    )


def build_machine(
    config: RunConfig, shape: ModelShape, plan: ExpansionPlan, *, load: Callable[[Sequence[LlamaModel]], None]
) -> Machine:
    """Build what computes, on every rank of the started world. `load` fills the weights before the optimizer makes its
    copies of them.

    Raises:
        ConfigError: what trains, or a parameter-group rule, is nothing in this model.
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
    report = freeze(
        models,
        plan,
        config.model.trainable,
        tie_word_embeddings=shape.tie_word_embeddings,
        tensor_size=layout.tensor_size,
    )
    skip_frozen_work(models, first_trainable_layer(config.model.trainable, plan, lora=config.lora))
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


def _checked_source(config: RunConfig) -> Source:
    """Everything that can be known to be wrong before a model is built, agreed on by all ranks."""
    source, error = None, None
    try:
        source = _read_source(config)
    except LlamaProError as found:
        error = found
    raise_together(error)
    assert source is not None  # raise_together raised otherwise
    folder, resume_from = from_first_rank((source.folder, source.resume_from))
    return replace(source, folder=folder, resume_from=resume_from)


def _read_source(config: RunConfig) -> Source:
    check_apex()
    data_parallel_size(config, torch.distributed.get_world_size())
    folder = starting_checkpoint(config)
    check_loadable(folder)
    shape = model_shape(read_hf_config(folder))
    manifest = Manifest.read(folder)
    manifest.check_fits(shape)
    check_fits(config, shape, manifest.plan)
    _check_precision(config, manifest, folder)
    if config.lora.rank is not None and uses_transformer_engine(config.model.transformer_impl):
        raise ConfigError("lora needs megatron.core's own linears: set model.transformer_impl to local")
    if config.logging.diagnostics_interval and not manifest.plan.added_layers:
        raise ConfigError("logging.diagnostics_interval is set, but the checkpoint has no added blocks: leave it out")
    carried_files(folder)  # what cannot be copied to the run's checkpoints is said now, not at the first of them
    tokenizer = load_tokenizer(Path(config.data.tokenizer or folder))
    check_train_files(config.data, vocab_size=shape.vocab_size)
    _make_cache_dir(config)
    held_out = build_valid_datasets(config.data, vocab_size=shape.vocab_size, eod=tokenizer.eod)
    identity = run_identity(config)
    resume_from = checkpoint_to_resume(config, manifest, identity)
    if resume_from is None and AdapterRecord.read(folder):
        raise CheckpointError(
            f"{folder} has low-rank adapters beside its weights, and a new run would leave them out: merge them first "
            f"(tools/convert_checkpoint.py megatron-to-megatron --source {folder} --target MERGED)"
        )
    return Source(folder, manifest, shape, tokenizer, held_out, identity, resume_from)


def _check_precision(config: RunConfig, manifest: Manifest, folder: Path) -> None:
    """Weights are trained in the type they are stored in: a cast would change every original weight unseen."""
    wanted = _MANIFEST_DTYPE[config.training.precision]
    if manifest.dtype != wanted:
        raise ConfigError(
            f"training.precision is {config.training.precision}, but {folder} holds {manifest.dtype} weights: "
            f"convert it with --dtype {wanted}, or change training.precision"
        )


def wrapped(model: LlamaModel, parallel: ParallelConfig) -> DistributedDataParallel:
    """The model in megatron.core's DDP: gradient buffers in float32, for what trains only."""
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        model,
    )
    skip_collectives_of_one(ddp)
    return ddp


def _train_set(config: RunConfig, source: Source) -> CheckedDataset:
    return build_train_dataset(
        config.data,
        num_samples=config.data_order_samples,
        seed=config.training.seed,
        tokenizer=source.tokenizer,
        vocab_size=source.shape.vocab_size,
        cache_dir=_cache_dir(config),
    )


def _cache_dir(config: RunConfig) -> Path:
    """The folder for the order of the samples."""
    metrics = metrics_path(config.logging, save=config.checkpoint.save)
    return Path(config.data.cache_dir or metrics.parent / ".cache")


def _make_cache_dir(config: RunConfig) -> None:
    folder = _cache_dir(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made: {error.strerror}: set data.cache_dir to a folder for the order of the samples"
        ) from None
