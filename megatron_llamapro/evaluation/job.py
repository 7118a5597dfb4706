"""What an evaluation reads: the held-out sets, and how the model is divided. One rank reads it; all ranks get it.

Imports no torch, so that errors appear before the slow imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llamapro.checkpoint.description import check_shape
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.config.checks import check_ranges, count_replicas
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import (
    DataConfig,
    DataFormat,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainingConfig,
)
from megatron_llamapro.config.values import DTYPES
from megatron_llamapro.data.token_files import TokenFile, check_token_file
from megatron_llamapro.data.tokenizer import tokenizer_file

_PRECISION_OF = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp32"}


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """Held-out sets, and how to evaluate on them."""

    sets: Mapping[str, str]
    """Prefixes of token files by name."""
    seq_length: int
    num_samples: int | None = None
    """Samples of each set, evenly spaced. If None, all."""
    micro_batch_size: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision | None = None
    """If None, that of the checkpoint's type; fp32 for float16."""
    data_format: DataFormat = "text"
    tokenizer: Path | None = None
    """If None, the checkpoint's own."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` if a number is out of range."""
        least = dict.fromkeys(("seq_length", "num_samples", "micro_batch_size"), 1)
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        check_ranges(self, {**least, **{f"parallel.{name}": 1 for name in sizes}})

    def tokenizer_of(self, checkpoint: Checkpoint) -> Path:
        """Return the tokenizer's file. Raises `DataError` if there is none."""
        return tokenizer_file(self.tokenizer or checkpoint.folder)

    def precision_of(self, checkpoint: Checkpoint) -> Precision:
        """Return the precision to evaluate a checkpoint in."""
        return self.precision or _PRECISION_OF[checkpoint.dtype]

    def dtype_of(self, checkpoint: Checkpoint) -> str:
        """Return the type of the weights in that precision."""
        return DTYPES[self.precision_of(checkpoint)]

    def parallel_of(self, checkpoint: Checkpoint) -> ParallelConfig:
        """Return the parallelism. megatron.core runs experts on several tensor-parallel ranks with sequence parallelism
        only."""
        sizes = self.parallel
        needs_sequence = checkpoint.shape.is_moe and sizes.tensor_model_parallel_size > 1
        return ParallelConfig(
            tensor_model_parallel_size=sizes.tensor_model_parallel_size,
            pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
            sequence_parallel=needs_sequence,
        )

    def config_of(self, checkpoint: Checkpoint) -> RunConfig:
        """Return the configuration of a run that only evaluates this checkpoint."""
        return RunConfig(
            model=ModelConfig(checkpoint=str(checkpoint.folder)),
            data=DataConfig(train=(), seq_length=self.seq_length, valid=dict(self.sets), format=self.data_format),
            training=TrainingConfig(train_iters=1, micro_batch_size=1, global_batch_size=1),
            parallel=self.parallel_of(checkpoint),
        )

    def check(self, checkpoints: Sequence[Checkpoint], *, world_size: int) -> dict[str, TokenFile]:
        """Return the sets' token files by prefix. Raise `LlamaProError` if a checkpoint cannot be evaluated on
        `world_size` ranks, or on these sets."""
        for checkpoint in checkpoints:
            count_replicas(self.parallel, world_size)
            check_shape(self.config_of(checkpoint), checkpoint.shape)
            self.tokenizer_of(checkpoint)
        smallest = min(checkpoints, key=lambda checkpoint: checkpoint.shape.vocab_size)
        return {prefix: self._token_file(name, prefix, smallest) for name, prefix in self.sets.items()}

    def _token_file(self, name: str, prefix: str, checkpoint: Checkpoint) -> TokenFile:
        try:
            return check_token_file(prefix, vocab_size=checkpoint.shape.vocab_size, data_format=self.data_format)
        except DataError as error:
            raise DataError(f"set {name}: {error}") from None
