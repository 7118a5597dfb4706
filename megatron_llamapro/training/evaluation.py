"""The loss of each held-out set, by name. Every parallel layout evaluates the same samples in the same order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.utils.data import Dataset, default_collate

from megatron_llamapro.data.conversations import Sample
from megatron_llamapro.data.tokenizer import Tokenizer
from megatron_llamapro.runtime.distributed import ParallelLayout
from megatron_llamapro.training.step import Batch, reduce_loss, run_microbatches


@dataclass(frozen=True)
class HeldOutSet:
    """The samples of a held-out set that every evaluation passes: evenly spaced, or all if `wanted` is None."""

    dataset: Dataset
    wanted: int | None
    token_bytes: torch.Tensor
    """UTF-8 bytes of text that each token stands for [vocabulary]."""

    def __len__(self) -> int:
        available = len(self.dataset)
        return available if self.wanted is None else min(self.wanted, available)

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.dataset[number * len(self.dataset) // len(self)]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of text that the tokens which have a loss stand for."""
        return sum(int((self.token_bytes[sample["labels"]] * sample["loss_mask"]).sum()) for sample in self)


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a held-out set."""

    loss: float
    """Mean loss per token, in nats; NaN if no token counts."""
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of text that these tokens stand for."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss of a byte of text, in bits. Models with different tokenizers can be compared by it."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def held_out_sets(
    datasets: Mapping[str, Dataset], tokenizer: Tokenizer, *, num_samples: int | None, vocab_size: int
) -> dict[str, HeldOutSet]:
    """Return the sets to evaluate, by name. `vocab_size` is the model's: ids that the tokenizer lacks stand for no
    text."""
    if not datasets:
        return {}  # without reading the vocabulary
    sizes = tokenizer.token_bytes()
    token_bytes = torch.tensor(sizes + [0] * (vocab_size - len(sizes)), device="cpu")
    return {name: HeldOutSet(dataset, num_samples, token_bytes) for name, dataset in datasets.items()}


def evaluate(
    chunks: Sequence[torch.nn.Module],
    held_out: Mapping[str, HeldOutSet],
    *,
    layout: ParallelLayout,
    micro_batch_size: int,
    seq_length: int,
    progress: Callable[[int], object] = lambda num_samples: None,
    before_batch: Callable[[str, Batch], object] = lambda name, batch: None,
) -> dict[str, HeldOutLoss]:
    """Return the loss of every held-out set. All ranks call it.

    `chunks` are this rank's chunks of the model. `progress` is called with numbers of samples: those that all replicas
    pass beside the micro-batch which this rank starts. `before_batch` is called with the set's name and each
    micro-batch, right before its pass through the first chunk.
    """
    trained = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    losses = {}
    with torch.no_grad():
        for name, samples in held_out.items():
            num_microbatches = _num_microbatches(len(samples), micro_batch_size=micro_batch_size, layout=layout)
            passes = [_batches(samples, micro_batch_size, num_microbatches, layout) for _ in chunks]
            shares = _shares(len(samples), micro_batch_size * layout.data_size)
            passes[0] = _reported(passes[0], shares, progress, partial(before_batch, name))
            sums = run_microbatches(
                chunks,
                passes,
                num_microbatches=num_microbatches,
                micro_batch_size=micro_batch_size,
                seq_length=seq_length,
                forward_only=True,
            )
            reduced = reduce_loss(sums, layout=layout)
            losses[name] = HeldOutLoss(reduced.loss, reduced.num_tokens, samples.num_bytes)
    for chunk, mode in zip(chunks, trained, strict=True):
        chunk.train(mode)
    return losses


def _num_microbatches(count: int, *, micro_batch_size: int, layout: ParallelLayout) -> int:
    """Return how many micro-batches a replica runs; the interleaved schedule needs a multiple of the stages."""
    needed = -(-count // (micro_batch_size * layout.data_size))
    multiple = layout.pipeline_size if layout.virtual_pipeline_size else 1
    return -(-needed // multiple) * multiple


def _batches(
    samples: HeldOutSet, micro_batch_size: int, num_microbatches: int, layout: ParallelLayout
) -> Iterator[Batch]:
    """Yield this replica's micro-batches. Places past the last sample hold sample 0 with its loss masked."""
    for number in range(num_microbatches):
        first = (number * layout.data_size + layout.data_rank) * micro_batch_size
        batch = []
        for place in range(first, first + micro_batch_size):
            is_past = place >= len(samples)
            sample = dict(samples[0 if is_past else place])
            if is_past:
                sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
            batch.append(sample)
        yield default_collate(batch)


def _shares(count: int, size: int) -> Iterator[int]:
    """Yield how many of `count` samples each micro-batch of all replicas has, `size` or fewer; 0 after the last."""
    for first in itertools.count(step=size):
        yield min(max(count - first, 0), size)


def _reported(
    batches: Iterator[Batch],
    shares: Iterator[int],
    progress: Callable[[int], object],
    before: Callable[[Batch], object],
) -> Iterator[Batch]:
    for batch, num_samples in zip(batches, shares, strict=False):
        before(batch)
        progress(num_samples)
        yield batch
