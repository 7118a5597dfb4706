"""What holds for numbers and words wherever they are given: in YAML, and as any command's option."""

from __future__ import annotations

from collections.abc import Collection

LARGEST_INT, LARGEST_FLOAT = 10**15, 1e30
"""No count, rate or time is near; sums, products and quotients of such numbers stay finite."""

LARGEST_VOCAB_MULTIPLE = 2**20
"""Of make_vocab_size_divisible_by: what is padded is held, and written."""

# Megatron's and Hugging Face's word for a dtype.
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_OTHER_SPELLING = _DTYPES | {long: short for short, long in _DTYPES.items()}


def spelled_as(choices: Collection[str], word: str) -> str:
    """A dtype's other spelling, where that is one of the choices; any other word as it is."""
    other = _OTHER_SPELLING.get(word)
    return other if other in choices and word not in choices else word


def printable(text: str) -> str:
    """A name or path in a line of a message: line breaks and the like as one writes them."""
    return text if text.isprintable() else repr(text)[1:-1]
