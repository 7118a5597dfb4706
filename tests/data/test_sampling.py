"""The order of the data depends only on the samples consumed, for any number of replicas."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import BlendEntry, DataConfig
from megatron_llamapro.data.sampling import BatchSampler, check_same_order, data_order_fingerprint, train_batches


def global_batches(
    *, consumed: int, size: int, micro: int, total: int, batch: int, left_out: tuple[range, ...] = ()
) -> list[list[int]]:
    """Return the samples of every step over all replicas, in the order of the data."""
    samplers = [
        BatchSampler(
            num_samples=total,
            consumed_samples=consumed,
            micro_batch_size=micro,
            global_batch_size=batch,
            data_parallel_rank=rank,
            data_parallel_size=size,
            iteration=consumed // batch,
            left_out=left_out,
        )
        for rank in range(size)
    ]
    rounds = batch // (micro * size)
    by_rank = [list(sampler) for sampler in samplers]
    steps = len(by_rank[0]) // rounds
    return [
        sorted(
            index for ranks in by_rank for indices in ranks[step * rounds : (step + 1) * rounds] for index in indices
        )
        for step in range(steps)
    ]


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 5), st.integers(0, 9))
def test_every_replica_count_reads_the_same_steps(size: int, micro: int, steps_done: int, extra: int) -> None:
    total = 8 * 6 + extra
    found = global_batches(consumed=8 * steps_done, size=size, micro=micro, total=total, batch=8)
    whole = [list(range(start, start + 8)) for start in range(0, total - 7, 8)]
    assert found == whole[steps_done:]


@given(st.sampled_from([1, 2, 4]), st.integers(0, 5), st.sets(st.integers(1, 6)))
def test_skipped_steps_leave_the_others_unchanged(size: int, steps_done: int, steps: set[int]) -> None:
    """Also if the run continues after some of them."""
    named = tuple(range(step, step + 1) for step in steps)
    found = global_batches(consumed=8 * steps_done, size=size, micro=2, total=48, batch=8, left_out=named)
    rest = [step for step in range(steps_done + 1, 7) if step not in steps]
    assert found == [list(range(8 * (step - 1), 8 * step)) for step in rest]


class Damaged(Dataset):
    """Five samples; the fourth cannot be trained on."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        if index == 3:
            raise DataError("the token 600 is beyond the vocabulary")
        return {"tokens": index}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_is_one_line_that_names_its_step(num_workers: int) -> None:
    """A bad sample is not read if its step is skipped."""
    settings = {"num_samples": 5, "consumed_samples": 1, "micro_batch_size": 1, "global_batch_size": 1}
    settings |= {"data_parallel_rank": 0, "data_parallel_size": 1, "iteration": 6, "num_workers": num_workers}
    batches = train_batches(Damaged(), **settings)
    assert [int(next(batches)["tokens"]) for _ in range(2)] == [1, 2]
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == (
        "step 9: the token 600 is beyond the vocabulary, or name the step in training.skip_iterations"
    )
    with contextlib.closing(train_batches(Damaged(), **settings, left_out=[range(9, 10)])) as batches:
        assert [int(next(batches)["tokens"]) for _ in range(3)] == [1, 2, 4]


def test_used_up_data_is_an_error() -> None:
    batches = train_batches(
        [{"tokens": 0}] * 4,
        num_samples=4,
        consumed_samples=0,
        micro_batch_size=2,
        global_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataError, match=r"data\.train_samples"):
        next(batches)


def test_a_changed_fingerprint_names_the_difference(pair: Path, tmp_path: Path) -> None:
    data = DataConfig(train=(BlendEntry(str(pair)),), seq_length=16)
    stored = data_order_fingerprint(data, num_samples=8, seed=1)
    check_same_order(stored, data_order_fingerprint(data, num_samples=8, seed=1))
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"moved{ending}").write_bytes(Path(f"{pair}{ending}").read_bytes())
    moved = dataclasses.replace(data, train=(BlendEntry(str(tmp_path / "moved")),))
    check_same_order(stored, data_order_fingerprint(moved, num_samples=8, seed=1))
    changes = {
        r"training\.seed \(1\), now \(2\)": data_order_fingerprint(data, num_samples=8, seed=2),
        r"train_samples": data_order_fingerprint(data, num_samples=9, seed=1),
        r"data\.seq_length": data_order_fingerprint(dataclasses.replace(data, seq_length=8), num_samples=8, seed=1),
        r"data\.train \(": data_order_fingerprint(
            dataclasses.replace(data, train=(BlendEntry(str(pair), 3.0),)), num_samples=8, seed=1
        ),
    }
    for message, current in changes.items():
        with pytest.raises(DataError, match=message):
            check_same_order(stored, current)
