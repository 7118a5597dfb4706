"""Samples: held-out sets in the file's order; training sets blended, shuffled, packed and repeatable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import BlendEntry, DataConfig
from megatron_llamapro.data.dataset import CheckedDataset, HeldOutDataset, build_train_dataset
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import open_token_file
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.testing.distributed import run_distributed

SEQ_LENGTH = 32


def stream(prefix: Path) -> torch.Tensor:
    dataset = open_token_file(prefix)
    return torch.from_numpy(numpy.concatenate([dataset[i] for i in range(len(dataset))]).astype(numpy.int64))


@pytest.mark.parametrize("seq_length", [1, 7, 500, 5000])
def test_held_out_samples_are_the_token_stream(seq_length: int, pair: Path) -> None:
    held_out = HeldOutDataset(str(pair), seq_length=seq_length, vocab_size=131)
    tokens = stream(pair)
    assert len(held_out) == (len(tokens) - 1) // seq_length
    for index in {0, 1, len(held_out) // 2, len(held_out) - 1}:
        sample = held_out[index]
        start = index * seq_length
        assert torch.equal(sample["tokens"], tokens[start : start + seq_length])
        assert torch.equal(sample["labels"], tokens[start + 1 : start + seq_length + 1])
        assert sample["loss_mask"].sum() == seq_length
    with pytest.raises(IndexError):
        held_out[len(held_out)]


def test_held_out_masks_the_first_token_of_a_new_document(pair: Path) -> None:
    sample = HeldOutDataset(str(pair), seq_length=5000, vocab_size=131, eod=2)[0]
    assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == 2)
    assert (sample["loss_mask"] == 0).any()


def test_too_short_a_held_out_set_is_refused(pair: Path) -> None:
    with pytest.raises(DataError, match="fewer than one sample"):
        HeldOutDataset(str(pair), seq_length=10**7, vocab_size=131)


@pytest.fixture
def build(pair: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable:
    def make(*, entries: tuple[BlendEntry, ...] | None = None, seed: int = 1, num_samples: int = 40, cache: str = "c"):
        data = DataConfig(train=entries or (BlendEntry(str(pair)),), seq_length=SEQ_LENGTH)
        tokenizer = load_tokenizer(tokenizer_folder)
        return build_train_dataset(
            data, num_samples=num_samples, seed=seed, tokenizer=tokenizer, vocab_size=131, cache_dir=tmp_path / cache
        )

    return make


def tokens_of(dataset, count: int = 40) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


def test_the_same_seed_gives_the_same_samples(build: Callable) -> None:
    """Built again, read from the cache, or in another folder. Another seed gives other samples."""
    first = tokens_of(build())
    assert torch.equal(first, tokens_of(build()))
    assert torch.equal(first, tokens_of(build(cache="other")))
    assert not torch.equal(first, tokens_of(build(seed=2)))


def test_changed_files_are_noticed(build: Callable, copied_pair: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """megatron.core's cache identifies files by their path only."""
    entries = (BlendEntry(str(copied_pair)),)
    tokens_of(build(entries=entries))
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "only this " * 200}) + "\n")
    preprocess([tmp_path / "new.jsonl"], copied_pair, tokenizer=tokenizer_folder, overwrite=True)
    letters = set(load_tokenizer(tokenizer_folder).encode("only this "))
    assert set(tokens_of(build(entries=entries)).flatten().tolist()) <= letters | {2}


def test_a_token_beyond_the_vocabulary_is_refused(pair: Path) -> None:
    """The sample itself shows it if there is no side file."""
    held_out = HeldOutDataset(str(pair), seq_length=16, vocab_size=131)
    with pytest.raises(DataError, match="another tokenizer"):
        CheckedDataset(held_out, name="x", vocab_size=10)[0]


def test_a_negative_token_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=numpy.int32)
    builder.add_document(numpy.array([5, 6, -7, 8, 9, 2], dtype=numpy.int32), [6])
    builder.finalize(str(tmp_path / "x.idx"))
    held_out = HeldOutDataset(str(tmp_path / "x"), seq_length=4, vocab_size=131)
    with pytest.raises(DataError, match="below 0"):
        CheckedDataset(held_out, name="x", vocab_size=131)[0]


def blend_worker(entries: tuple[BlendEntry, ...], tokenizer_folder: Path, cache: Path) -> list[int]:
    """Return the set that each sample comes from, on this rank."""
    data = DataConfig(train=entries, seq_length=SEQ_LENGTH)
    tokenizer = load_tokenizer(tokenizer_folder)
    dataset = build_train_dataset(data, num_samples=100, seed=1, tokenizer=tokenizer, vocab_size=131, cache_dir=cache)
    return [int(dataset[i]["dataset_id"]) for i in range(100)]


def test_blend_keeps_its_weights(pair: Path, copied_pair: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    entries = (BlendEntry(str(pair), 3.0), BlendEntry(str(copied_pair), 1.0))
    ranks = run_distributed(blend_worker, 2, entries, tokenizer_folder, tmp_path / "cache")
    assert ranks[0] == ranks[1]
    assert ranks[0].count(0) == 75
    for count in range(1, 101):
        assert abs(ranks[0][:count].count(0) - 0.75 * count) <= 1
