"""Values as people write and read them: numbers, words, paths and sizes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

LARGEST_INT, LARGEST_FLOAT = 10**15, 1e30
"""Limits far above any count, rate or time. Sums, products and quotients of numbers below them stay finite."""

LARGEST_VOCAB_MULTIPLE = 2**20
"""Limit of make_vocab_size_divisible_by, because padding takes memory and disk."""

GIB = 2**30

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
"""Megatron's name of a dtype, as in `training.precision` -> Hugging Face's and torch's."""
_OTHER_SPELLING = DTYPES | {long: short for short, long in DTYPES.items()}


def spelled_as(choices: Collection[str], word: str) -> str:
    """Return a dtype's other spelling if that is one of the choices, else the word unchanged."""
    other = _OTHER_SPELLING.get(word)
    return other if other in choices and word not in choices else word


def decimal_size(num_bytes: float) -> str:
    """Format the size of a file in the units of disks: 1234567 → 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # from here on, three digits would be 1e+03
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def binary_size(num_bytes: float) -> str:
    """Format a size of memory in the units of GPUs: 1.50 GiB, 22.1 MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def printable(text: str) -> str:
    """Return a name or path as one line of a message shows it: line breaks and the like are escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expand_user(text: str) -> str:
    """Return `text` with a leading `~` or `~user` replaced by that home folder.

    Variables such as `$HOME` are an error: a shell has already replaced them, YAML does not, and nobody wants a folder
    of that name.

    Raises:
        ValueError: it is empty, names a user that does not exist or a variable, or has a character that no path has.
    """
    if not text:
        raise ValueError("it is empty: name a file or folder")
    if any(ord(character) < 32 for character in text):
        raise ValueError("it contains a control character")
    if variable := _VARIABLE.search(text):
        raise ValueError(f"variables such as {variable[0]} are not replaced: write the whole path, or ~ for home")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.split("/")[0]
        raise ValueError(
            f"no home folder is known for {user}: write the path itself (or ./{user} for a folder of that name)"
        ) from None
