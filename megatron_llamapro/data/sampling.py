"""The samples of each rank and step: a pure function of the data's order and the number of samples consumed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch.utils.data import DataLoader, Dataset

from megatron_llamapro.config.checks import count_microbatches
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import BlendEntry, DataConfig
from megatron_llamapro.data.token_files import TokenFile, content_digest, is_content
from megatron_llamapro.runtime.stop import children_deaf, end_with_parent


class BatchSampler:
    """Indices of this replica's micro-batches, from the first unconsumed sample on.

    Each global batch is the next `global_batch_size` samples of the order. They are dealt out to the replicas one
    micro-batch at a time. A run that resumes with another number of replicas trains on the same global batches.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        iteration: int = 0,
        left_out: Sequence[range] = (),
    ) -> None:
        """`iteration` is the number of steps done. Samples of the steps in `left_out` (counted from 1) are not read."""
        starts = range(consumed_samples, num_samples - global_batch_size + 1, global_batch_size)
        self.steps = {
            step: start
            for step, start in enumerate(starts, iteration + 1)
            if not any(step in steps for steps in left_out)
        }
        rounds = count_microbatches(
            global_batch_size, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size
        )
        self.rounds = range(rounds)
        self.micro_batch_size = micro_batch_size
        self.rank, self.size = data_parallel_rank, data_parallel_size

    def __len__(self) -> int:
        return len(self.steps) * len(self.rounds)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.steps.values():
            for number in self.rounds:
                first = start + (number * self.size + self.rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


def train_batches(
    dataset: Dataset,
    *,
    num_samples: int,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    iteration: int = 0,
    left_out: Sequence[range] = (),
    num_workers: int = 0,
) -> Iterator[dict]:
    """Yield this replica's micro-batches, [b, s] tensors by name, until `num_samples` are consumed. Close it when done.

    Raises:
        DataError: a sample cannot be trained on, or the samples are used up and more are asked for.
    """
    sampler = BatchSampler(
        num_samples=num_samples,
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        iteration=iteration,
        left_out=left_out,
    )
    with children_deaf():
        batches = iter(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                num_workers=num_workers,
                worker_init_fn=partial(_end_with_parent, os.getpid()) if num_workers else None,
            )
        )
    try:
        for step in sampler.steps:
            for _ in sampler.rounds:
                yield _next_of(batches, step)
    finally:
        if num_workers:  # Python would send SIGTERM and wait, but they block it
            batches._shutdown_workers()
    raise DataError(
        f"all {num_samples} samples of the data's order are used up: set data.train_samples for a longer run"
    )


def _next_of(batches: Iterator[dict], step: int) -> dict:
    try:
        return next(batches)
    except DataError as error:
        reason = str(error).rpartition(f"{DataError.__name__}: ")[2].strip()  # from a worker, it ends a traceback
        raise DataError(f"step {step}: {reason}, or name the step in training.skip_iterations") from error


def _end_with_parent(parent: int, worker: int) -> None:
    end_with_parent(parent)


def data_order_fingerprint(
    data: DataConfig, *, num_samples: int, seed: int, checked: Mapping[str, TokenFile] | None = None
) -> dict[str, object]:
    """Return everything that the order of the samples depends on. The files' paths are not part of it. `checked` holds
    the pairs by prefix if they have been read already."""

    def digest(prefix: str) -> str:
        return checked[prefix].digest if checked else content_digest(prefix)

    return {
        "train_samples": num_samples,
        "seed": seed,
        "seq_length": data.seq_length,
        "eod_mask_loss": data.eod_mask_loss,
        "format": data.format,
        "packing": data.packing,
        "blend": [[digest(entry.prefix), float(entry.weight)] for entry in data.train],
    }


_WHERE_SET = {
    "train_samples": "training.train_iters, training.global_batch_size or data.train_samples",
    "seed": "training.seed",
    "seq_length": "data.seq_length",
    "eod_mask_loss": "data.eod_mask_loss",
    "format": "data.format",
    "packing": "data.packing",
    "blend": "data.train (its files, their order or their weights)",
}


def check_same_order(
    stored: Mapping[str, object], current: Mapping[str, object], *, train: Sequence[BlendEntry] = ()
) -> None:
    """Raise `DataError` if a resumed run would read its samples in another order than it started with.

    `train` is the blend that `current` describes. It is needed to check the hashes that earlier versions stored.
    """
    stored = {"format": "text", "packing": False, **stored}  # earlier versions knew only these
    for name, where in _WHERE_SET.items():
        if stored.get(name) != current[name] and not (name == "blend" and _is_blend(stored.get(name), train)):
            was, now = (f" ({value})" if name != "blend" else "" for value in (stored.get(name), current[name]))
            raise DataError(
                f"the run in checkpoint.save started with another {where}{was}, now{now or ' changed'}: its remaining "
                "data would come in another order; restore it, or start a new run in another checkpoint.save with "
                "model.checkpoint set to this one"
            )


def _is_blend(stored: object, train: Sequence[BlendEntry]) -> bool:
    return (
        isinstance(stored, list)
        and len(stored) == len(train)
        and all(
            weight == entry.weight and is_content(digest, entry.prefix)
            for (digest, weight), entry in zip(stored, train, strict=True)
        )
    )
