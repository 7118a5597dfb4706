"""Hashes of a checkpoint's tensors, computed on several threads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_llamapro.checkpoint.formats.adapters import rows_of
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.tensors.computed import cast_along
from megatron_llamapro.checkpoint.tensors.streaming import Progress, SourceFiles, hash_rows, nothing
from megatron_llamapro.families.hf_config import ITEMSIZES


def tensor_hashes(
    checkpoint: Checkpoint,
    names: Collection[str],
    files: SourceFiles,
    pool: ThreadPoolExecutor,
    *,
    types: Sequence[str] | None = None,
    progress: Progress = nothing,
) -> dict[str, str]:
    """Return the hashes of the tensors with these names, merged, averaged and dialed (`formats.adapters.rows_of`), and
    cast to each of `types` in turn (default: as they are stored)."""

    def hash_of(name: str) -> str:
        along = types or (checkpoint.dtype_of(name),)
        rows = cast_along(rows_of(checkpoint, name, files, dtype=along[0]), types=along, name=name)
        return hash_rows(rows, checkpoint.tensors[name], ITEMSIZES[along[-1]], progress=progress)

    return dict(zip(names, pool.map(hash_of, names), strict=True))
