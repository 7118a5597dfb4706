"""Everything a run is built from, in order: checks, model, what trains, optimizer, data, and where it continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from megatron_llamapro.checkpoint.formats.adapters import AdapterRecord
from megatron_llamapro.config.checks import count_microbatches
from megatron_llamapro.config.errors import CheckpointError, ConfigError, LlamaProError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.data.dataset import CheckedDataset, build_train_dataset, build_valid_datasets
from megatron_llamapro.data.index_cache import make_cache_dir
from megatron_llamapro.data.tokenizer import Tokenizer, load_tokenizer
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.model.build import LlamaModel
from megatron_llamapro.model.freeze import StageReport
from megatron_llamapro.model.spec import uses_transformer_engine
from megatron_llamapro.optimizer.build import check_apex
from megatron_llamapro.runtime.distributed import ParallelLayout, from_first_rank, raise_together
from megatron_llamapro.training.checkpoints.resume import RunIdentity, checkpoint_to_resume, run_identity
from megatron_llamapro.training.checkpoints.state import TrainingState, load_checkpoint, load_model
from megatron_llamapro.training.machine import build_machine
from megatron_llamapro.training.metrics import metrics_path
from megatron_llamapro.training.start import read_start


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
        return count_microbatches(
            training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_size=self.layout.data_size,
        )


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
    start = read_start(config, world_size=torch.distributed.get_world_size())
    folder, manifest, shape = start.folder, start.manifest, start.shape
    if config.lora.rank is not None and uses_transformer_engine(config.model.transformer_impl):
        raise ConfigError("lora needs megatron.core's own linears: set model.transformer_impl to local")
    tokenizer = load_tokenizer(start.tokenizer)
    make_cache_dir(_cache_dir(config))
    held_out = build_valid_datasets(config.data, vocab_size=shape.vocab_size, eod=tokenizer.eod)
    identity = run_identity(config)
    resume_from = checkpoint_to_resume(config, manifest, identity)
    if resume_from is None and AdapterRecord.read(folder):
        raise CheckpointError(
            f"{folder} has low-rank adapters beside its weights, and a new run would leave them out: merge them first "
            f"(llamapro convert megatron-to-megatron --source {folder} --target MERGED)"
        )
    return Source(folder, manifest, shape, tokenizer, held_out, identity, resume_from)


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
