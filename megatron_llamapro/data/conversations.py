"""Samples of whole conversations: nothing is cut, and only the assistant's words have loss.

A sample is one conversation and padding; with `packing`, it is as many conversations as fit. Packing is best fit,
longest first. The rows are known before training starts. Every pass over the data has other rows, and every
conversation is in exactly one row of a pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from torch.utils.data import Dataset

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.token_files import TokenFile, open_token_file


@dataclass
class ConversationConfig(BlendedMegatronDatasetConfig):
    """The options of `ConversationDataset`: megatron.core's own, and packing."""

    packing: bool = False


@dataclass(frozen=True)
class Pass:
    """One pass over a set: the conversations of each sample."""

    documents: numpy.ndarray
    """The conversations of all samples, sample by sample."""
    starts: numpy.ndarray
    """Index into `documents` at which each sample starts; the last entry is the length of `documents`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, sample: int) -> numpy.ndarray:
        return self.documents[self.starts[sample] : self.starts[sample + 1]]


class Conversations:
    """The conversations of a pair that fit into one sample: `seq_length` inputs and the last label, one token more.

    Raises:
        DataError: no conversation fits.
    """

    def __init__(self, pair: IndexedDataset, *, name: str, seq_length: int, padding: int) -> None:
        self.pair, self.seq_length, self.padding = pair, seq_length, padding
        self._first_turns = pair.document_indices
        self.lengths = numpy.add.reduceat(pair.sequence_lengths, self._first_turns[:-1], dtype=numpy.int64)
        self.fitting = numpy.flatnonzero(self.lengths <= seq_length + 1)
        if not len(self.fitting):
            raise DataError(
                f"{name}: none of its {len(self.lengths)} conversations fits into data.seq_length {seq_length}; the "
                f"shortest has {self.lengths.min()} tokens"
            )

    def one_pass(self, *, packing: bool, seed: Sequence[int] | None) -> Pass:
        """Return all conversations that fit, in an order drawn from `seed`; without a seed, in the file's order."""
        order = self.fitting
        if seed is not None:
            order = numpy.random.default_rng(seed).permutation(order)
        if not packing:
            return Pass(order, numpy.arange(len(order) + 1))
        rows = packed(self.lengths[order], self.seq_length + 1)
        if seed is not None:
            rows = [rows[number] for number in numpy.random.default_rng([*seed, 1]).permutation(len(rows))]
        starts = numpy.cumsum([0, *map(len, rows)])
        return Pass(order[numpy.fromiter(itertools.chain.from_iterable(rows), numpy.int64, len(order))], starts)

    def sample(self, documents: numpy.ndarray) -> Sample:
        """Return the conversations `documents`, end to end. Only labels that the assistant says have loss."""
        stream = torch.full([self.seq_length + 1], self.padding)
        is_answer = torch.zeros(self.seq_length + 1)
        end = 0
        for document in documents:
            turns, modes = self.pair[self._first_turns[document] : self._first_turns[document + 1]]
            start = end
            for turn, mode in zip(turns, modes, strict=True):
                stream[end : end + len(turn)] = torch.from_numpy(turn.astype(numpy.int64))
                is_answer[end : end + len(turn)] = float(mode == 1)
                end += len(turn)
            is_answer[start] = 0.0  # the token before it belongs to another conversation
        return sample_of(stream, is_answer[1:])


def packed(lengths: numpy.ndarray, capacity: int) -> list[list[int]]:
    """Pack the indices of `lengths` into rows of at most `capacity` tokens: the longest first, each into the fullest
    row that still has space. Equal lengths keep their order."""
    rows: list[list[int]] = []
    with_place: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by how many more tokens they can hold
    places = 0  # bit n: some row can hold exactly n more tokens
    for index in numpy.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = places >> length
        if fitting:
            place = length + (fitting & -fitting).bit_length() - 1
            row = with_place[place].pop()
            if not with_place[place]:
                places &= ~(1 << place)
        else:
            place, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_place[place - length].append(row)
        places |= 1 << (place - length)
    return rows


class ConversationDataset(MegatronDataset):
    """The conversations of a pair to train on, pass after pass, each in a new order. megatron.core blends several."""

    config: ConversationConfig

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.conversations = Conversations(
            dataset, name=dataset_path, seq_length=config.sequence_length, padding=config.tokenizer.eod
        )
        self._passes: list[Pass] = []
        while not self._passes or len(self) < (num_samples or 1):
            seed = [config.random_seed, len(self._passes)]
            self._passes.append(self.conversations.one_pass(packing=config.packing, seed=seed))

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: ConversationConfig) -> IndexedDataset:
        return IndexedDataset(dataset_path, multimodal=True)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), "packing"]

    def __len__(self) -> int:
        return sum(map(len, self._passes))

    def __getitem__(self, idx: int) -> Sample:
        for one_pass in self._passes:
            if idx < len(one_pass):
                return self.conversations.sample(one_pass[idx])
            idx -= len(one_pass)
        raise IndexError(idx)

    @property
    def summary(self) -> str:
        """One line about one pass over the set, for people."""
        lengths, fitting = self.conversations.lengths, self.conversations.fitting
        samples = len(self._passes[0])
        too_long = len(lengths) - len(fitting)
        left_out = f", {too_long:,} longer than data.seq_length left out" if too_long else ""
        advice = "" if self.config.packing else " (data.packing: true fills them)"
        return (
            f"{self.dataset_path}: {len(fitting):,} conversations{left_out}; one pass is {samples:,} samples, "
            f"{lengths[fitting].sum() / (samples * (self.config.sequence_length + 1)):.0%} full{advice}"
        )


class HeldOutConversations(Dataset):
    """The conversations of a pair in the file's order, each once.

    Raises (on opening):
        DataError: the pair cannot be read, or none of its conversations fits.
    """

    def __init__(
        self,
        prefix: str,
        *,
        seq_length: int,
        packing: bool,
        vocab_size: int,
        padding: int,
        checked: TokenFile | None = None,
    ) -> None:
        pair = open_token_file(prefix, vocab_size=vocab_size, data_format="chat", checked=checked)
        self.conversations = Conversations(pair, name=prefix, seq_length=seq_length, padding=padding)
        self._pass = self.conversations.one_pass(packing=packing, seed=None)

    def __len__(self) -> int:
        return len(self._pass)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.conversations.sample(self._pass[index])


Sample = dict[str, torch.Tensor]
"""tokens, labels, position_ids: int64 [s]; loss_mask: float32 [s]."""


def sample_of(stream: torch.Tensor, loss_mask: torch.Tensor) -> Sample:
    """Make a sample of `stream` [s + 1], where each token is the label of the one before, and the labels' `loss_mask`
    [s]."""
    return {
        "tokens": stream[:-1].contiguous(),
        "labels": stream[1:].contiguous(),
        "loss_mask": loss_mask.contiguous(),
        "position_ids": torch.arange(len(loss_mask)),
    }
