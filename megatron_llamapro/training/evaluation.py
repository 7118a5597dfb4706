"""Mean loss of each held-out set, by name. Every parallel layout evaluates the same samples in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import Dataset, default_collate

from megatron_llamapro.runtime.distributed import ParallelLayout
from megatron_llamapro.training.machine import Machine
from megatron_llamapro.training.step import Batch, LossSum, reduce_loss, run_microbatches


def evaluate(
    machine: Machine,
    held_out: Mapping[str, Dataset],
    *,
    num_samples: int,
    micro_batch_size: int,
    seq_length: int,
) -> dict[str, LossSum]:
    """Return the loss of every held-out set, over `num_samples` evenly spaced samples, or all if it has fewer. All
    ranks call it."""
    chunks, layout = machine.chunks, machine.layout
    for chunk in chunks:
        chunk.eval()
    losses = {}
    with torch.no_grad():
        for name, dataset in held_out.items():
            count = min(num_samples, len(dataset))
            num_microbatches = _num_microbatches(count, micro_batch_size=micro_batch_size, layout=layout)
            sums = run_microbatches(
                chunks,
                [_batches(dataset, count, micro_batch_size, num_microbatches, layout) for _ in chunks],
                num_microbatches=num_microbatches,
                micro_batch_size=micro_batch_size,
                seq_length=seq_length,
                forward_only=True,
            )
            losses[name] = reduce_loss(sums, layout=layout)
    for chunk in chunks:
        chunk.train()
    return losses


def _num_microbatches(count: int, *, micro_batch_size: int, layout: ParallelLayout) -> int:
    """Return how many micro-batches a replica runs; the interleaved schedule needs a multiple of the stages."""
    needed = -(-count // (micro_batch_size * layout.data_size))
    multiple = layout.pipeline_size if layout.virtual_pipeline_size else 1
    return -(-needed // multiple) * multiple


def _batches(
    dataset: Dataset, count: int, micro_batch_size: int, num_microbatches: int, layout: ParallelLayout
) -> Iterator[Batch]:
    """Yield this replica's micro-batches. Places past the last sample hold sample 0 with its loss masked."""
    for number in range(num_microbatches):
        first = (number * layout.data_size + layout.data_rank) * micro_batch_size
        samples = []
        for index in range(first, first + micro_batch_size):
            sample = dict(dataset[index * len(dataset) // count if index < count else 0])
            if index >= count:
                sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
            samples.append(sample)
        yield default_collate(samples)
