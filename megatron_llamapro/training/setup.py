"""Builds a run on every rank: read and check the small files, open the held-out data, build the model, load, and open
the training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.config.checks import count_microbatches
from megatron_llamapro.config.errors import ConfigError, LlamaProError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.data.dataset import CheckedDataset, build_train_dataset, build_valid_datasets
from megatron_llamapro.data.index_cache import make_cache_dir
from megatron_llamapro.data.tokenizer import Tokenizer, load_tokenizer
from megatron_llamapro.model.build import LlamaModel
from megatron_llamapro.model.spec import uses_transformer_engine
from megatron_llamapro.optimizer.build import check_apex
from megatron_llamapro.runtime.distributed import ParallelLayout, ask_first_rank, raise_together
from megatron_llamapro.training.checkpoints.resume import RunIdentity, checkpoint_to_resume, run_identity
from megatron_llamapro.training.checkpoints.state import TrainingState, load_checkpoint, load_model
from megatron_llamapro.training.evaluation import HeldOutSet, held_out_sets
from megatron_llamapro.training.machine import Machine, build_machine
from megatron_llamapro.training.metrics import metrics_path
from megatron_llamapro.training.start import Start, read_start


@dataclass(frozen=True)
class Run:
    """A run that is ready to train. Only `state` (and the tensors) change from here on."""

    config: RunConfig
    machine: Machine
    start: Start
    resume_from: SmallFiles | None
    """The run's own newest checkpoint, if it was started before."""
    identity: RunIdentity
    train_set: CheckedDataset
    held_out: Mapping[str, HeldOutSet]
    """By name; empty if nothing is evaluated."""
    state: TrainingState

    @property
    def layout(self) -> ParallelLayout:
        """This rank's place in the parallel layout."""
        return self.machine.layout

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that a replica runs in a step."""
        training = self.config.training
        return count_microbatches(
            training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_size=self.layout.data_size,
        )


def set_up(config: RunConfig, *, read_by_rank_0: Start | None = None) -> Run:
    """Build the run on every rank, after `start_world`, or raise the same error on all of them.

    Rank 0 alone reads the small files, and passes their contents to the others. `read_by_rank_0` is what it read before
    the world started; it is ignored on other ranks.

    Raises:
        LlamaProError: the configuration, the checkpoint or the data cannot be trained with.
    """
    world_size = torch.distributed.get_world_size()
    start = ask_first_rank(lambda: read_by_rank_0 or read_start(config, world_size=world_size))
    tokenizer = ask_first_rank(lambda: load_tokenizer(start.tokenizer))
    identity = run_identity(config, start.token_files)
    resume_from = ask_first_rank(lambda: checkpoint_to_resume(config, start.source, identity))
    held_out = _check_this_rank(config, start, resume_from, tokenizer)

    def load(models: Sequence[LlamaModel]) -> None:
        if resume_from is None:
            load_model(models, start.source)

    machine = build_machine(config, start.shape, start.plan, load=load)
    return Run(
        config=config,
        machine=machine,
        start=start,
        resume_from=resume_from,
        identity=identity,
        state=load_checkpoint(machine, resume_from) if resume_from else TrainingState(),
        train_set=_train_set(config, start, tokenizer),
        held_out=held_out_sets(
            held_out if config.training.eval_interval else {},
            tokenizer,
            num_samples=config.training.eval_samples,
            vocab_size=start.shape.vocab_size,
        ),
    )


def _check_this_rank(
    config: RunConfig, start: Start, resume_from: SmallFiles | None, tokenizer: Tokenizer
) -> Mapping[str, Dataset]:
    """Check what may differ between ranks: installed packages and visible files. All ranks agree on the result before a
    model is built. Return the opened held-out sets."""
    held_out: Mapping[str, Dataset] = {}
    error = None
    try:
        check_apex()
        if config.lora.rank is not None and uses_transformer_engine(config.model.transformer_impl):
            raise ConfigError("lora needs megatron.core's own linear layers: set model.transformer_impl to local")
        start.check_there()
        if resume_from:
            resume_from.check_there()
        make_cache_dir(_cache_dir(config))
        held_out = build_valid_datasets(
            config.data, vocab_size=start.shape.vocab_size, eod=tokenizer.eod, checked=start.token_files
        )
    except LlamaProError as found:
        error = found
    raise_together(error)
    return held_out


def _train_set(config: RunConfig, start: Start, tokenizer: Tokenizer) -> CheckedDataset:
    return build_train_dataset(
        config.data,
        num_samples=config.data_order_samples,
        seed=config.training.seed,
        tokenizer=tokenizer,
        vocab_size=start.shape.vocab_size,
        cache_dir=_cache_dir(config),
        checked=start.token_files,
        mark_known=config.keep.penalty_weight > 0 and config.keep.penalty_on == "known",
    )


def _cache_dir(config: RunConfig) -> Path:
    """Return the folder that caches the order of the samples."""
    metrics = metrics_path(config.logging, save=config.checkpoint.save)
    return Path(config.data.cache_dir or metrics.parent / ".cache")
