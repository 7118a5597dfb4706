"""What tells one pair of token files from another: their content, and nothing beside it.

A run that is resumed has to read the rest of the same tokens. Hashing terabytes would delay every start, so of the
tokens only blocks are hashed, evenly spread over the file; of the index, which has the length of every document and
what of a conversation is an answer, all. Text that was changed or tokenized otherwise has other lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy
from blake3 import blake3

from megatron_llamapro.data.inputs import paths_of
from megatron_llamapro.data.token_files import read_info

_MARK = "blake3-sampled:"
_BLOCK_BYTES, _NUM_BLOCKS = 2**14, 256


def content_digest(prefix: str | Path) -> str:
    """A hash of the whole index and of blocks of the tokens; of all tokens, where they are at most 4 MiB."""
    bin_path, index_path, _ = paths_of(prefix)
    size = bin_path.stat().st_size
    digest = blake3(size.to_bytes(8, "little"), max_threads=blake3.AUTO).update_mmap(index_path)
    with bin_path.open("rb") as file:
        if size <= _BLOCK_BYTES * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for start in numpy.linspace(0, size - _BLOCK_BYTES, _NUM_BLOCKS, dtype=numpy.int64).tolist():
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return _MARK + digest.hexdigest()


def is_content(stored: str, prefix: str | Path) -> bool:
    """Whether a digest, stored by this or an earlier version, is of the pair."""
    if stored.startswith(_MARK):
        return stored == content_digest(prefix)
    return any(stored == digest for digest in _earlier_digests(prefix))


_END_BYTES = 2**20


def _earlier_digests(prefix: str | Path) -> Iterator[str]:
    """Those of versions that went by the side file where there was one: the cheap ones first, and last that of all
    tokens, which the side file had, computed anew."""
    bin_path, index_path, _ = paths_of(prefix)
    info = read_info(prefix)
    of_index = _sha256(index_path)
    if info is not None:
        yield from _with_index(info.bin_sha256, of_index)
    ends = of_index.copy()
    size = bin_path.stat().st_size
    with bin_path.open("rb") as file:
        ends.update(file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        ends.update(file.read(_END_BYTES))
    ends.update(str(size).encode())
    yield ends.hexdigest()
    yield from _with_index(_sha256(bin_path).hexdigest(), of_index)


def _with_index(of_tokens: str, of_index) -> Iterator[str]:
    """Of text, and of conversations."""
    yield of_tokens
    yield hashlib.sha256(of_index.digest() + bytes.fromhex(of_tokens)).hexdigest()


def _sha256(path: Path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest
