"""Which samples an evaluation passes, in which micro-batches, and how many bytes of text they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_llamapro.training.evaluation import HeldOutSet, _batches, _reported, _shares, held_out_sets

SAMPLES = [
    {"labels": torch.tensor([number, number + 1]), "loss_mask": torch.tensor([1.0, float(number % 2)])}
    for number in range(10)
]


@pytest.mark.parametrize(("wanted", "numbers"), [(None, range(10)), (20, range(10)), (4, (0, 2, 5, 7)), (1, (0,))])
def test_samples_are_evenly_spaced(wanted: int | None, numbers: object) -> None:
    assert [int(sample["labels"][0]) for sample in HeldOutSet(SAMPLES, wanted, torch.ones(11))] == [*numbers]


def test_bytes_are_counted_where_there_is_a_loss() -> None:
    """Ids 8 and above are beyond the tokenizer: they stand for no text."""
    tokenizer = SimpleNamespace(token_bytes=lambda: [1, 2, 3, 4, 5, 6, 7, 8])
    held = held_out_sets({"a": SAMPLES}, tokenizer, num_samples=None, vocab_size=11)["a"]
    first = sum(range(1, 9))  # the first label of samples 0 to 7
    second = sum(number + 2 for number in (1, 3, 5))  # the second one of odd samples: their id + 1
    assert held.num_bytes == first + second


@pytest.mark.parametrize(("num_replicas", "num_samples"), [(1, 5), (2, 5), (3, 7)])
def test_progress_reaches_the_number_of_samples(num_replicas: int, num_samples: int) -> None:
    """Before the last batch is passed, too."""
    held = HeldOutSet(SAMPLES, num_samples, torch.ones(11))
    for rank in range(num_replicas):
        layout = SimpleNamespace(data_size=num_replicas, data_rank=rank)
        count = -(-num_samples // (2 * num_replicas))
        seen: list[int] = []
        batches = _reported(
            _batches(held, 2, count, layout), _shares(num_samples, 2 * num_replicas), seen.append, lambda batch: None
        )
        for _ in range(count):
            next(batches)
        assert sum(seen) == num_samples
