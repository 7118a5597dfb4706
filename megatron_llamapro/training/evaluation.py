"""Mean loss of held-out sets, each under its name, at any division of the world: the same samples, in order."""

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
    """Loss of `num_samples` samples, evenly spaced, of every held-out set, or of all it has. All ranks call it."""
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
    """Micro-batches a replica runs; for the interleaved schedule a multiple of the stages."""
    needed = -(-count // (micro_batch_size * layout.data_size))
    multiple = layout.pipeline_size if layout.virtual_pipeline_size else 1
    return -(-needed // multiple) * multiple


def _batches(
    dataset: Dataset, count: int, micro_batch_size: int, num_microbatches: int, layout: ParallelLayout
) -> Iterator[Batch]:
    """This replica's micro-batches; places past the last sample are filled with sample 0 at no loss."""
    for number in range(num_microbatches):
        first = (number * layout.data_size + layout.data_rank) * micro_batch_size
        samples = []
        for index in range(first, first + micro_batch_size):
            sample = dict(dataset[index * len(dataset) // count if index < count else 0])
            if index >= count:
                sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
            samples.append(sample)
        yield default_collate(samples)
