"""What a preprocessing is asked for, and what of it can be refused before it begins.

Imports neither torch nor megatron, so that it is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.text_files import check_text_files
from megatron_llamapro.data.tokenizer import tokenizer_file

_MOST_WORKERS = 1000


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, the .idx and our side file of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def check_request(
    inputs: Sequence[Path], output_prefix: Path, *, tokenizer: Path, num_workers: int, overwrite: bool
) -> None:
    """What `preprocess` can refuse before it begins.

    Raises:
        DataError: an input or the tokenizer is missing, an input is not jsonl, the output would replace an input, or
            token files that are there (unless `overwrite`), or there cannot be so many workers.
    """
    if not 1 <= num_workers <= _MOST_WORKERS:
        raise DataError(f"--num_workers is {num_workers}: give a number of processes from 1 to {_MOST_WORKERS}")
    read = {path.resolve() for path in inputs}
    for path in paths_of(output_prefix):
        if path.resolve() in read:
            raise DataError(f"{path} is an input and would be written: choose another --output_prefix")
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists: choose another --output_prefix, or give --overwrite")
    check_text_files(inputs, jsonl=True)
    tokenizer_file(tokenizer)
