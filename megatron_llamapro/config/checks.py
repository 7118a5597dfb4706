"""Checks of a run's configuration. They raise and never change a value. Imports neither torch nor megatron.

`check_run_config` needs only the configuration. `data_parallel_size` also needs the number of ranks, and `check_model`
the model's shape. All run before anything is built or written.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import (
    CheckpointConfig,
    LoraConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_llamapro.config.values import LARGEST_VOCAB_MULTIPLE

_AT_LEAST_ONE = (
    ("parallel", "tensor_model_parallel_size"),
    ("parallel", "pipeline_model_parallel_size"),
    ("data", "seq_length"),
    ("data", "train_samples"),
    ("training", "train_iters"),
    ("training", "micro_batch_size"),
    ("training", "global_batch_size"),
    ("training", "eval_samples"),
    ("training", "max_skipped_steps"),
    ("logging", "log_interval"),
    ("model", "make_vocab_size_divisible_by"),
)
_NOT_NEGATIVE = (
    ("training", "eval_interval"),
    ("training", "hang_timeout_minutes"),
    ("checkpoint", "save_interval"),
    ("logging", "diagnostics_interval"),
    ("optimizer", "lr"),
    ("optimizer", "min_lr"),
    ("optimizer", "weight_decay"),
    ("optimizer", "clip_grad"),
    ("optimizer", "adam_eps"),
    ("data", "num_workers"),
    ("training", "seed"),
)
# Times stay below a timer's limit. A seed and its successors fit into numpy's 32 bits.
_AT_MOST = {
    "model.make_vocab_size_divisible_by": LARGEST_VOCAB_MULTIPLE,
    "data.num_workers": 1000,
    "training.seed": 2**31,
    "training.hang_timeout_minutes": 10**6,
    "parallel.distributed_timeout_minutes": 10**6,
}


def check_run_config(config: RunConfig) -> None:
    """Raise `ConfigError` if values are out of range or contradict each other."""
    check_ranges(config, {f"{section}.{name}": 1 for section, name in _AT_LEAST_ONE})
    check_ranges(config, {f"{section}.{name}": 0 for section, name in _NOT_NEGATIVE}, _AT_MOST)
    _check_optimizer(config)
    _check_data(config)
    _check_keep(config)
    _check_parallel(config.parallel)
    _check_retention(config.checkpoint)
    _check_recompute(config.recompute)
    _check_lora(config)
    if config.training.exit_interval is not None and config.training.exit_interval < 1:
        raise ConfigError("training.exit_interval must be at least 1: leave it out to run to the end")
    if config.logging.wandb_name is not None and config.logging.wandb_project is None:
        raise ConfigError("logging.wandb_name is set, but logging.wandb_project is not: set both, or leave it out")
    if config.training.exit_interval is not None and config.checkpoint.save is None:
        raise ConfigError("training.exit_interval saves and stops: set checkpoint.save to the folder to save in")
    left_out(config.training)
    if not config.model.trainable:
        raise ConfigError("model.trainable is empty: name at least one part to train, e.g. added_blocks")


def check_ranges(config: object, least: Mapping[str, int], most: Mapping[str, int] = MappingProxyType({})) -> None:
    """Raise `ConfigError` if a field is set and below its value in `least` or above its value in `most`. Fields are
    given by dotted name."""
    for name, bound in least.items():
        value = operator.attrgetter(name)(config)
        if value is not None and value < bound:
            raise ConfigError(f"{name} is {value}: it {f'must be at least {bound}' if bound else 'cannot be negative'}")
    for name, bound in most.items():
        value = operator.attrgetter(name)(config)
        if value is not None and value > bound:
            raise ConfigError(f"{name} is {value}: it must be at most {bound}")


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    if not 0 <= optimizer.lr_warmup_fraction < 1:
        raise ConfigError(
            f"optimizer.lr_warmup_fraction is {optimizer.lr_warmup_fraction}: it must be in [0, 1), e.g. 0.06"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise ConfigError(f"optimizer.{name} is {getattr(optimizer, name)}: it must be in [0, 1)")
    for rule in optimizer.param_groups:
        if min(rule.lr_mult, rule.wd_mult or 0) < 0:
            raise ConfigError(f"optimizer.param_groups: lr_mult and wd_mult of {rule.match} cannot be negative")
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"optimizer.min_lr ({optimizer.min_lr}) is above optimizer.lr ({optimizer.lr})")


def _check_data(config: RunConfig) -> None:
    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty: name at least one .bin/.idx prefix")
    for entry in data.train:
        if entry.weight <= 0:
            raise ConfigError(f"data.train: {entry.prefix} has weight {entry.weight}: weights must be above 0")
    if data.packing and data.format != "chat":
        raise ConfigError("data.packing is for data.format chat: text is always packed; leave it out")
    if data.eod_mask_loss and data.format != "text":
        raise ConfigError("data.eod_mask_loss is for data.format text: in chat only answers have loss; leave it out")
    save = config.checkpoint.save
    if save is None or not Path(save).exists():  # a resumed run may have used another batch size for earlier steps
        check_samples(config)
    if config.training.eval_interval and not data.valid:
        raise ConfigError("training.eval_interval is set, but data.valid names no held-out set")


def _check_keep(config: RunConfig) -> None:
    keep = config.keep
    if not (math.isfinite(keep.penalty_weight) and keep.penalty_weight >= 0):
        raise ConfigError(f"keep.penalty_weight is {keep.penalty_weight}: it must be a number from 0 on, e.g. 3")
    if keep.penalty_weight and keep.penalty_on == "known" and not any(entry.known for entry in config.data.train):
        raise ConfigError("keep.penalty_on is known, but no source of data.train is: mark one with known: true")


def check_samples(config: RunConfig, *, iteration: int = 0, consumed_samples: int = 0) -> None:
    """Raise `ConfigError` if the data's order is too short for the rest of a run: the part after step `iteration` and
    the first `consumed_samples` samples."""
    batch, train_iters = config.training.global_batch_size, config.training.train_iters
    steps, left = train_iters - iteration, config.data_order_samples - consumed_samples
    needed = steps * batch
    if steps <= 0 or needed <= left:
        return
    if not iteration:
        raise ConfigError(
            f"data.train_samples is {left}, but {train_iters} steps of {batch} samples need {needed}: "
            f"set --data.train_samples {needed}, or --training.train_iters {left // batch}"
        )
    smaller = f", or --training.global_batch_size {left // steps} or less" if left >= steps else ""
    raise ConfigError(
        f"the run in checkpoint.save has used {consumed_samples} of the {config.data_order_samples} samples in its "
        f"data's order in {iteration} steps, and {steps} more steps of {batch} need {needed}: "
        f"{consumed_samples} + {needed} > {config.data_order_samples}; "
        f"set --training.train_iters {iteration + left // batch}{smaller}; only a new run can have a longer order"
    )


def _check_retention(checkpoint: CheckpointConfig) -> None:
    for name in ("save_interval", "async_save", "keep_last", "keep_every"):
        if checkpoint.save is None and getattr(checkpoint, name):
            raise ConfigError(f"checkpoint.{name} is set, but nothing is saved: set checkpoint.save, or leave it out")
    for name in ("keep_last", "keep_every"):
        value = getattr(checkpoint, name)
        if value is not None and value < 1:
            raise ConfigError(f"checkpoint.{name} is {value}: it must be at least 1; leave it out to keep all")
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        raise ConfigError("checkpoint.keep_every makes exceptions from keep_last: set checkpoint.keep_last too")


def _check_parallel(parallel: ParallelConfig) -> None:
    stages = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and (stages < 2 or virtual < 2):
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size is {virtual} with {stages} pipeline stages: "
            "the interleaved schedule needs at least 2 of each"
        )
    layers = parallel.pipeline_stage_layers
    if layers is not None and (len(layers) != stages * (virtual or 1) or min(layers) < 0):
        raise ConfigError(
            f"parallel.pipeline_stage_layers has {len(layers)} entries: it needs one number of layers (0 or more) "
            f"for each of the {stages * (virtual or 1)} (virtual) stages"
        )
    if parallel.distributed_timeout_minutes <= 0:
        raise ConfigError("parallel.distributed_timeout_minutes must be above 0: else no rank waits for another")
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError("parallel.sequence_parallel needs parallel.tensor_model_parallel_size above 1: leave it out")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ConfigError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce")


def _check_recompute(recompute: RecomputeConfig) -> None:
    full, selective = recompute.granularity == "full", recompute.granularity == "selective"
    if full and (recompute.method is None or recompute.num_layers is None):
        raise ConfigError(
            "recompute.granularity is full: it needs recompute.method (uniform or block) and recompute.num_layers"
        )
    if selective and not recompute.modules:
        raise ConfigError("recompute.granularity is selective: name recompute.modules, e.g. [mlp]")
    if recompute.num_layers is not None and recompute.num_layers < 1:
        raise ConfigError(f"recompute.num_layers is {recompute.num_layers}: it must be at least 1")
    for name, belongs in (("method", full), ("num_layers", full), ("modules", selective)):
        if getattr(recompute, name) and not belongs:
            raise ConfigError(
                f"recompute.{name} is set, but recompute.granularity is {recompute.granularity}: it applies only to "
                f"{'selective' if name == 'modules' else 'full'}"
            )


def _check_lora(config: RunConfig) -> None:
    lora, trainable = config.lora, config.model.trainable
    if lora.rank is not None and lora.rank < 1:
        raise ConfigError(f"lora.rank is {lora.rank}: it must be at least 1; leave it out to have no adapters")
    if lora.alpha is not None and lora.alpha <= 0:
        raise ConfigError(f"lora.alpha is {lora.alpha}: it must be above 0")
    if not lora.targets:
        raise ConfigError("lora.targets is empty: name at least one linear layer, e.g. linear_qkv")
    if "lora" in trainable and lora.rank is None:
        raise ConfigError("model.trainable names lora, but there are no adapters: set lora.rank, e.g. 16")
    if "lora" not in trainable and lora != LoraConfig():
        raise ConfigError("lora is set, but its adapters do not train: add lora to model.trainable, or leave it out")
    if "lora" in trainable and "everything" in trainable:
        raise ConfigError("model.trainable names everything and lora: choose one of them")


def count_microbatches(global_batch_size: int, *, micro_batch_size: int, data_parallel_size: int) -> int:
    """Return the number of micro-batches that a replica runs in a step.

    Raises:
        ConfigError: the global batch cannot be divided into them.
    """
    samples = micro_batch_size * data_parallel_size
    if global_batch_size % samples:
        raise ConfigError(
            f"training.global_batch_size ({global_batch_size}) is not a multiple of micro_batch_size "
            f"({micro_batch_size}) x data-parallel size ({data_parallel_size}) = {samples}"
        )
    return global_batch_size // samples


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the number of replicas that `world_size` ranks form.

    Raises:
        ConfigError: the ranks, the batch or the micro-batches cannot be divided evenly.
    """
    parallel, training = config.parallel, config.training
    replicas = count_replicas(parallel, world_size)
    micro_batches = count_microbatches(
        training.global_batch_size, micro_batch_size=training.micro_batch_size, data_parallel_size=replicas
    )
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size and micro_batches % stages:
        raise ConfigError(
            f"the interleaved schedule needs a multiple of {stages} micro-batches (one a stage), not {micro_batches}: "
            "change training.global_batch_size"
        )
    return replicas


def count_replicas(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of replicas that `world_size` ranks form, or raise `ConfigError` if one is incomplete."""
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} rank{'s' * (world_size > 1)} cannot be divided into replicas of "
            f"{parallel.tensor_model_parallel_size} tensor-parallel x {parallel.pipeline_model_parallel_size} pipeline "
            f"ranks: start a multiple of {model_ranks} processes"
        )
    return world_size // model_ranks


def check_model(
    config: RunConfig,
    *,
    num_layers: int,
    num_attention_heads: int,
    num_query_groups: int,
    ffn_hidden_size: int,
    has_experts: bool = False,
) -> None:
    """Raise `ConfigError` if the model cannot be divided as `config.parallel` says."""
    parallel = config.parallel
    tensor_ranks = parallel.tensor_model_parallel_size
    counts = {
        "attention heads": num_attention_heads,
        "query groups (key-value heads)": num_query_groups,
        "feed-forward columns": ffn_hidden_size,
    }
    for name, count in counts.items():
        if count % tensor_ranks:
            raise ConfigError(
                f"the model's {count} {name} cannot be divided by parallel.tensor_model_parallel_size {tensor_ranks}"
            )
    for part, there in (("moe", has_experts), ("mlp", not has_experts)):
        if part in config.recompute.modules and not there:
            raise ConfigError(
                f"recompute.modules names '{part}', but the model has {'' if has_experts else 'no '}experts: name "
                f"{'moe' if has_experts else 'mlp'}"
            )
    if has_experts and tensor_ranks > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            "in megatron.core, a model with experts needs sequence parallelism to train on several tensor-parallel "
            "ranks: set parallel.sequence_parallel to true"
        )
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if parallel.pipeline_stage_layers is None and num_layers < stages:
        raise ConfigError(f"the model has {num_layers} layers, fewer than the {stages} (virtual) pipeline stages")
    if parallel.pipeline_stage_layers is not None and sum(parallel.pipeline_stage_layers) != num_layers:
        raise ConfigError(
            f"parallel.pipeline_stage_layers has {sum(parallel.pipeline_stage_layers)} layers in total, "
            f"but the model has {num_layers}"
        )
    if parallel.sequence_parallel and config.data.seq_length % tensor_ranks:
        raise ConfigError(
            f"data.seq_length ({config.data.seq_length}) cannot be divided by {tensor_ranks} tensor-parallel ranks"
        )


_STEPS = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


def left_out(training: TrainingConfig) -> Sequence[range]:
    """Return the steps that `skip_iterations` names.

    Raises:
        ConfigError: an entry is neither a step of the run nor a range of its steps.
    """
    return [_steps(str(entry), training.train_iters) for entry in training.skip_iterations]


def is_left_out(iteration: int, training: TrainingConfig) -> bool:
    """Whether `skip_iterations` names this step."""
    return any(iteration in steps for steps in left_out(training))


def _steps(entry: str, train_iters: int) -> range:
    found = _STEPS.fullmatch(entry)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= train_iters:
        raise ConfigError(
            f"training.skip_iterations has {entry}: give a step (7) or a first and a last one (7-9), from 1 to "
            f"training.train_iters ({train_iters})"
        )
    return range(first, last + 1)
