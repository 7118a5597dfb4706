"""Datasets: blended, shuffled, packed training samples (megatron.core's), and held-out sets in file order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_llamapro.config.errors import DataError, LlamaProError
from megatron_llamapro.config.schema import DataConfig
from megatron_llamapro.data.conversations import (
    ConversationConfig,
    ConversationDataset,
    HeldOutConversations,
    Sample,
    sample_of,
)
from megatron_llamapro.data.index_cache import is_whole, make_cache_dir, new_order, unreadable
from megatron_llamapro.data.token_files import TokenFile, check_token_files, open_token_file
from megatron_llamapro.data.tokenizer import Tokenizer
from megatron_llamapro.runtime.distributed import from_first_rank, raise_together


class CheckedDataset(Dataset):
    """Samples whose tokens are in the model's vocabulary. A token beyond it would read another weight or crash CUDA.

    With `known`, which says of every source in the blend whether it is marked known, a sample has its source's mark.
    """

    def __init__(self, dataset: Dataset, *, name: str, vocab_size: int, known: Sequence[bool] = ()) -> None:
        self.dataset, self.name, self.vocab_size, self.known = dataset, name, vocab_size, known

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        if min(int(sample["tokens"].min()), int(sample["labels"].min())) < 0:
            raise DataError(f"{self.name} holds a token below 0: it is damaged; preprocess the text again")
        largest = max(int(sample["tokens"].max()), int(sample["labels"].max()))
        if largest >= self.vocab_size:
            raise DataError(
                f"{self.name} holds token {largest}, but the model's vocabulary has {self.vocab_size} tokens: the file "
                "was made with another tokenizer; preprocess the text again"
            )
        if self.known:  # a single source is not blended, and its samples have no number of their source
            return {**sample, "known": torch.tensor(self.known[sample.get("dataset_id", 0)])}
        return sample


class HeldOutDataset(Dataset):
    """Consecutive whole samples of a pair's tokens, in the file's order. The tail is left out.

    Raises (on opening):
        DataError: the pair cannot be read, or is shorter than one sample.
    """

    def __init__(
        self,
        prefix: str,
        *,
        seq_length: int,
        vocab_size: int,
        eod: int | None = None,
        checked: TokenFile | None = None,
    ) -> None:
        self.tokens = open_token_file(prefix, vocab_size=vocab_size, checked=checked)
        self.seq_length = seq_length
        self.eod = eod
        self._ends = numpy.cumsum(self.tokens.sequence_lengths, dtype=numpy.int64)
        self._num_samples = (int(self._ends[-1]) - 1) // seq_length
        if self._num_samples < 1:
            raise DataError(
                f"{prefix} has {self._ends[-1]} tokens, fewer than one sample of {seq_length} + 1: use a larger "
                "held-out set or a smaller data.seq_length"
            )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        """Return one sample. If `eod` is set, inputs that end a document have no loss."""
        if not 0 <= index < self._num_samples:
            raise IndexError(index)
        stream = torch.from_numpy(self._read(index * self.seq_length, self.seq_length + 1))
        return sample_of(stream, torch.ones(self.seq_length) if self.eod is None else (stream[:-1] != self.eod).float())

    def _read(self, start: int, count: int) -> numpy.ndarray:
        """Copy `count` tokens of the concatenated documents, from `start` on, out of the mapped file, as int64."""
        parts = []
        document = int(numpy.searchsorted(self._ends, start, side="right"))
        while count:
            offset = start - (int(self._ends[document - 1]) if document else 0)
            part = self.tokens.get(document, offset=offset)[:count].astype(numpy.int64)
            parts.append(part)
            start, count, document = start + len(part), count - len(part), document + 1
        return numpy.concatenate(parts)


def build_train_dataset(
    data: DataConfig,
    *,
    num_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    vocab_size: int,
    cache_dir: Path,
    checked: Mapping[str, TokenFile] | None = None,
    mark_known: bool = False,
) -> CheckedDataset:
    """Return the blended training set, with an order made for `num_samples`. All ranks call it; rank 0 builds the
    indices. `checked` holds the pairs by prefix if they have been checked already. With `mark_known`, samples say
    whether their source is marked known.

    If ranks may see different files, let them agree on `checked` first: an error on one rank alone leaves the others
    waiting.

    Raises:
        DataError: a pair is missing or damaged, or has another vocabulary; or a rank cannot read rank 0's indices.
        RunError: the disk is full.
    """
    pairs = checked or check_token_files(data, vocab_size=vocab_size)

    def build(folder: Path) -> Dataset:
        return megatron_dataset(data, num_samples=num_samples, seed=seed, tokenizer=tokenizer, folder=folder)

    order = {"num_samples": num_samples, "seed": seed, "tokenizer": tokenizer.unique_identifiers}
    folder, train, error = Path(), None, None
    try:
        if _is_first_rank():
            make_cache_dir(cache_dir)
            folder = cache_dir / _order_name(data, pairs, order)
            if not is_whole(folder):
                with new_order(folder) as draft:
                    train = build(draft)
    except LlamaProError as found:
        error = found
    folder = _agreed(error, folder)
    try:
        train = build(folder) if train is None else train
    except LlamaProError as found:
        error = found
    except (OSError, EOFError, ValueError) as found:
        error = unreadable(folder, found)
    _agreed(error, folder)
    assert train is not None  # _agreed raised otherwise
    known = [entry.known for entry in data.train] if mark_known else ()
    name = ", ".join(entry.prefix for entry in data.train)
    return CheckedDataset(train, name=name, vocab_size=vocab_size, known=known)


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _agreed(error: LlamaProError | None, folder: Path) -> Path:
    """Return the first rank's folder. All ranks call it. If one has an error, all raise it."""
    if torch.distributed.is_initialized():
        raise_together(error)
        return from_first_rank(folder)
    if error is not None:
        raise error
    return folder


def conversation_sets(train_set: CheckedDataset) -> list[ConversationDataset]:
    """Return the sets of conversations in a blended training set; none if it is text."""
    inner = train_set.dataset
    sets = inner.datasets if isinstance(inner, BlendedDataset) else [inner]
    return [part for part in sets if isinstance(part, ConversationDataset)]


def _order_name(data: DataConfig, pairs: Mapping[str, TokenFile], order: Mapping[str, object]) -> str:
    """Name an order by everything that its index files depend on. megatron.core's own names cover the paths of the
    token files, not their contents."""
    files = [[entry.prefix, entry.weight, pairs[entry.prefix].digest] for entry in data.train]
    settings = {"files": files, "seq_length": data.seq_length, "format": data.format, "packing": data.packing, **order}
    return f"order-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"


def build_valid_datasets(
    data: DataConfig, *, vocab_size: int, eod: int, checked: Mapping[str, TokenFile] | None = None
) -> dict[str, Dataset]:
    """Open the held-out sets, by name. `checked` holds the pairs by prefix if they have been checked already."""
    found: dict[str, Dataset] = {}
    for name, prefix in data.valid.items():
        inner = _held_out(prefix, data, vocab_size=vocab_size, eod=eod, checked=(checked or {}).get(prefix))
        found[name] = CheckedDataset(inner, name=prefix, vocab_size=vocab_size)
    return found


def _held_out(prefix: str, data: DataConfig, *, vocab_size: int, eod: int, checked: TokenFile | None) -> Dataset:
    if data.format == "chat":
        return HeldOutConversations(
            prefix,
            seq_length=data.seq_length,
            packing=data.packing,
            vocab_size=vocab_size,
            padding=eod,
            checked=checked,
        )
    return HeldOutDataset(
        prefix,
        seq_length=data.seq_length,
        vocab_size=vocab_size,
        eod=eod if data.eod_mask_loss else None,
        checked=checked,
    )


def megatron_dataset(data: DataConfig, *, num_samples: int, seed: int, tokenizer: Tokenizer, folder: Path) -> Dataset:
    """Return megatron.core's dataset. Its index files are read from `folder`; the first rank builds them in it."""
    shared = {
        "random_seed": seed,
        "sequence_length": data.seq_length,
        "tokenizer": tokenizer,
        "blend_per_split": [_blend(data), None, None],
        "path_to_cache": str(folder),
    }
    if data.format == "chat":
        kind, config = ConversationDataset, ConversationConfig(**shared, packing=data.packing)
    else:
        kind = GPTDataset
        config = GPTDatasetConfig(
            **shared,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=data.eod_mask_loss,
            create_attention_mask=False,
        )
    try:
        train, _, _ = _Alone(kind, [num_samples, 0, 0], lambda: True, config).build()
    except ModuleNotFoundError as missing:
        raise DataError(
            f"megatron.core's compiled dataset helper is missing ({missing.name}): install the megatron-core wheel for "
            "this Python and platform"
        ) from None
    return train


def _blend(data: DataConfig) -> tuple[list[str], list[float] | None]:
    """Return prefixes and weights. A single set has no weights: it needs no blending, and so no process group."""
    prefixes = [entry.prefix for entry in data.train]
    return prefixes, [entry.weight for entry in data.train] if len(prefixes) > 1 else None


class _Alone(BlendedMegatronDatasetBuilder):
    """Builds on this rank without waiting for the others, which start when all files are written."""

    @staticmethod
    def build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args):
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes, split, sizes_per_dataset):
        pairs = zip(prefixes, sizes_per_dataset, strict=True)
        of_each = [self._build_megatron_dataset_splits(prefix, split, sizes, False) for prefix, sizes in pairs]
        return [list(of_split) for of_split in zip(*of_each, strict=True)]
