"""megatron.core's datasets to train on: shuffled, and several blended by weight."""

from __future__ import annotations

from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import DataConfig
from megatron_llamapro.data.conversations import ConversationConfig, ConversationDataset
from megatron_llamapro.data.tokenizer import Tokenizer


def megatron_dataset(data: DataConfig, *, num_samples: int, seed: int, tokenizer: Tokenizer, folder: Path) -> Dataset:
    """megatron.core's dataset, its index files read from `folder`, or on the first rank built there."""
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
    """One set needs no blending, and then no process group either."""
    prefixes = [entry.prefix for entry in data.train]
    return prefixes, [entry.weight for entry in data.train] if len(prefixes) > 1 else None


class _Alone(BlendedMegatronDatasetBuilder):
    """Builds on this rank without waiting for others: they come when all files are written."""

    @staticmethod
    def build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args):
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes, split, sizes_per_dataset):
        pairs = zip(prefixes, sizes_per_dataset, strict=True)
        of_each = [self._build_megatron_dataset_splits(prefix, split, sizes, False) for prefix, sizes in pairs]
        return [list(of_split) for of_split in zip(*of_each, strict=True)]
