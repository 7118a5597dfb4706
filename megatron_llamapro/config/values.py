"""Values as people write and read them: numbers, words, paths and sizes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

LARGEST_INT, LARGEST_FLOAT = 10**15, 1e30
"""No count, rate or time is near; sums, products and quotients of such numbers stay finite."""

LARGEST_VOCAB_MULTIPLE = 2**20
"""Of make_vocab_size_divisible_by: what is padded is held, and written."""

GIB = 2**30

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
"""Megatron's word for a dtype, that of `training.precision` -> Hugging Face's and torch's."""
_OTHER_SPELLING = DTYPES | {long: short for short, long in DTYPES.items()}


def spelled_as(choices: Collection[str], word: str) -> str:
    """A dtype's other spelling, where that is one of the choices; any other word as it is."""
    other = _OTHER_SPELLING.get(word)
    return other if other in choices and word not in choices else word


def decimal_size(num_bytes: float) -> str:
    """Bytes of a file, in the units of disks: 1234567 → 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # above, three digits would be 1e+03
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def binary_size(num_bytes: float) -> str:
    """Bytes of memory, in the units of GPUs: 1.50 GiB, 22.1 MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def printable(text: str) -> str:
    """A name or path in a line of a message: line breaks and the like as one writes them."""
    return text if text.isprintable() else repr(text)[1:-1]


_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expand_user(text: str) -> str:
    """`text` with `~` or `~user` at its start replaced by that home folder.

    A folder that is really named `~` or `$HOME` is nobody's wish: a shell has replaced variables already, and a YAML
    file has none.

    Raises:
        ValueError: it is empty, names a user that does not exist or a variable, or has a character that no path has.
    """
    if not text:
        raise ValueError("it is empty: name a file or folder")
    if any(ord(character) < 32 for character in text):
        raise ValueError("it has a control character in it")
    if variable := _VARIABLE.search(text):
        raise ValueError(f"variables such as {variable[0]} are not replaced: write the path itself, or ~ for the home")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.split("/")[0]
        raise ValueError(
            f"no home folder is known for {user}: write the path itself (or ./{user} for that name)"
        ) from None
