"""A checkpoint of any format as a model in memory, on all ranks, ready to be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles
from megatron_llamapro.data.dataset import build_valid_datasets
from megatron_llamapro.data.token_files import TokenFile
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.evaluation.job import EvaluationJob
from megatron_llamapro.evaluation.weights import fill
from megatron_llamapro.model.build import LlamaModel, build_model
from megatron_llamapro.runtime.distributed import ParallelLayout, failing_together, start_model_parallel
from megatron_llamapro.training.evaluation import HeldOutLoss, HeldOutSet, evaluate, held_out_sets
from megatron_llamapro.training.step import Batch


@dataclass(frozen=True)
class EvaluatedModel:
    """This rank's part of a model, and the held-out sets."""

    job: EvaluationJob
    checkpoint: Checkpoint
    layout: ParallelLayout
    chunks: Sequence[LlamaModel]
    held_out: Mapping[str, HeldOutSet]

    @classmethod
    def load(cls, checkpoint: Checkpoint, job: EvaluationJob, token_files: Mapping[str, TokenFile]) -> EvaluatedModel:
        """Build the model, load it, and open the sets. All ranks of the started world call it.

        Raises:
            LlamaProError: a file cannot be read; on all ranks.
        """
        config = job.config_of(checkpoint)
        layout = start_model_parallel(config.parallel, seed=config.training.seed)
        chunks = build_model(
            checkpoint.shape,
            model=config.model,
            parallel=config.parallel,
            precision=job.precision_of(checkpoint),
        )
        with failing_together(f"{checkpoint.folder} cannot be evaluated"):
            tokenizer = load_tokenizer(job.tokenizer_of(checkpoint))
            datasets = build_valid_datasets(
                config.data, vocab_size=checkpoint.shape.vocab_size, eod=tokenizer.eod, checked=token_files
            )
            held_out = held_out_sets(
                datasets, tokenizer, num_samples=job.num_samples, vocab_size=checkpoint.shape.vocab_size
            )
        model = cls(job, checkpoint, layout, chunks, held_out)
        model.read_weights(checkpoint)
        return model

    def read_weights(self, checkpoint: Checkpoint, only: Collection[str] | None = None) -> None:
        """Read the weights of a checkpoint of the same model, or `only` those of some tensors. All ranks call it.

        Raises:
            CheckpointError: a file vanished or changed; on all ranks.
        """
        with failing_together(f"{checkpoint.folder} cannot be read"), SourceFiles(checkpoint.states) as files:
            fill(self.chunks, checkpoint, files, dtype=self.job.dtype_of(self.checkpoint), only=only)

    @property
    def num_samples(self) -> int:
        """Samples of all sets that one evaluation passes."""
        return sum(map(len, self.held_out.values()))

    def losses(
        self,
        progress: Callable[[int], object],
        *,
        before_batch: Callable[[str, Batch], object] = lambda name, batch: None,
    ) -> dict[str, HeldOutLoss]:
        """Return the loss of each set. All ranks call it. `progress` is called with numbers of samples, and
        `before_batch` with the set's name and each micro-batch, right before its pass on this rank."""
        return evaluate(
            self.chunks,
            self.held_out,
            layout=self.layout,
            micro_batch_size=self.job.micro_batch_size,
            seq_length=self.job.seq_length,
            progress=progress,
            before_batch=before_batch,
        )
