"""`.bin`/`.idx` pairs: checked when opened, identified by content, described by `<prefix>.json` beside them.

The format is megatron.core's (`IndexedDataset`), so Megatron-LM can read our files and we can read its files; only
the side file is ours. A text document is one sequence. A conversation has one sequence a turn, each with a mode, as in
multimodal sets: 1 for the assistant's words, 0 for the rest.

A resumed run must read the rest of the same tokens. Hashing terabytes would delay every start. So the digest covers
the whole index, which has the length of every document, and blocks spread evenly over the token file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy
from blake3 import blake3

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.files import POINTER_START, check_fetched, check_no_pointer
from megatron_llamapro.config.schema import DataConfig, DataFormat
from megatron_llamapro.data.text_files import paths_of

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


_HEADER = struct.Struct("<9sQBQQ")
"""Header of an index: magic, version, token type, number of sequences, number of documents."""
_PIECE = 2**20
"""Number of sequences checked at a time."""

TOKEN_TYPES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""numpy's names of the token types in an index: megatron.core's `DType` (which takes seconds to import), without the
types that tokens cannot have."""


@dataclass(frozen=True)
class TokenFileInfo:
    """The facts about a pair that preprocessing wrote to the side file."""

    num_documents: int
    num_tokens: int
    vocab_size: int
    """The tokenizer's vocabulary size."""
    max_token: int
    eod: int
    tokenizer_sha256: str
    bin_bytes: int
    bin_sha256: str
    num_answer_tokens: int | None = None
    """Tokens that the assistant says; None for text."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_info(prefix: str | Path) -> TokenFileInfo | None:
    """Read the side file. Return None if there is none, or if it does not match the current pair."""
    bin_path, _, info_path = paths_of(prefix)
    try:
        info = TokenFileInfo(**json.loads(info_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return info if bin_path.is_file() and info.bin_bytes == bin_path.stat().st_size else None


@dataclass(frozen=True)
class TokenFile:
    """A pair that passed `check_token_file`. One rank reads the whole index; the others rely on this record."""

    prefix: str
    has_modes: bool
    """Whether each sequence has a mode. Those of conversations do."""
    num_bytes: tuple[int, int]
    """Sizes of the token file and of the index."""
    digest: str
    """The pair's `content_digest`."""

    def check_there(self) -> None:
        """Raise `DataError` if this rank does not see the files that were checked."""
        for path, num_bytes in zip(paths_of(self.prefix)[:2], self.num_bytes, strict=True):
            if not path.is_file():
                raise DataError(f"{path} does not exist on this rank: put it where every rank can read it")
            if path.stat().st_size != num_bytes:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes, but {num_bytes} on the first rank: copy it again"
                )


def open_token_file(
    prefix: str | Path,
    *,
    vocab_size: int | None = None,
    data_format: DataFormat = "text",
    checked: TokenFile | None = None,
) -> IndexedDataset:
    """Open a pair, after `check_token_file` unless it is `checked` already."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    checked = checked or check_token_file(prefix, vocab_size=vocab_size, data_format=data_format)
    return IndexedDataset(str(prefix), multimodal=checked.has_modes)


def check_token_files(data: DataConfig, *, vocab_size: int) -> dict[str, TokenFile]:
    """Check every pair of the configuration. Return them by prefix. Imports no torch.

    Raises:
        DataError: a pair is missing or damaged, or has another vocabulary or format.
    """
    prefixes = dict.fromkeys([*(entry.prefix for entry in data.train), *data.valid.values()])
    return {prefix: check_token_file(prefix, vocab_size=vocab_size, data_format=data.format) for prefix in prefixes}


def check_token_file(
    prefix: str | Path, *, vocab_size: int | None = None, data_format: DataFormat = "text"
) -> TokenFile:
    """Check a pair's two files against each other and, if it is known, against the vocabulary. Opens the index once.
    Imports no torch.

    Raises:
        DataError: a file is missing, empty, damaged or from another pair; the pair has another format than
            `data_format`; or a token is beyond `vocab_size`.
    """
    bin_path, index_path, _ = paths_of(prefix)
    for path in (bin_path, index_path):
        if not path.is_file():
            raise DataError(f"{path} does not exist: {prefix} must be the path of a .bin/.idx pair without the suffix")
    check_fetched(bin_path, error=DataError)
    with index_path.open("rb") as index:
        has_modes = _check_index(bin_path, index_path, index)
        digest = _digest(bin_path, index)
    if has_modes and data_format == "text":
        raise DataError(f"{prefix} holds conversations: set data.format to chat, or preprocess text")
    if data_format == "chat" and not has_modes:
        raise DataError(f"{prefix} holds text: preprocess conversations with --chat, or set data.format to text")
    info = read_info(prefix)
    if info is not None and vocab_size is not None and info.max_token >= vocab_size:
        raise DataError(
            f"{prefix} holds token {info.max_token}, but the model's vocabulary has {vocab_size} tokens: the file was "
            "made with another tokenizer; preprocess the text again"
        )
    return TokenFile(str(prefix), has_modes, (bin_path.stat().st_size, index_path.stat().st_size), digest)


def _check_index(bin_path: Path, index_path: Path, index: BinaryIO) -> bool:
    """Check that the index is valid and matches the token file. Return whether its sequences have modes: a byte each,
    at the end of the index. (megatron.core notices only when it reads past the end, in mid-training, or never.)"""
    damaged = DataError(f"{index_path} is damaged: preprocess the text again")
    start = index.read(max(_HEADER.size, len(POINTER_START)))
    check_no_pointer(index_path, start, error=DataError)
    if len(start) < _HEADER.size:
        raise damaged
    magic, version, code, num_sequences, num_documents = _HEADER.unpack_from(start)
    if magic != b"MMIDIDX\x00\x00" or version != 1 or code not in TOKEN_TYPES:
        raise DataError(f"{index_path} is not an index of token files, or has an unknown version")
    least = _HEADER.size + num_sequences * (4 + 8) + num_documents * 8
    if num_sequences == 0:
        raise DataError(f"{index_path} holds no documents")
    if num_documents < 2 or index_path.stat().st_size not in (least, least + num_sequences):
        raise damaged
    lengths, pointers, documents = _arrays(index, num_sequences, num_documents)
    width = numpy.dtype(TOKEN_TYPES[code]).itemsize
    expected = int(lengths.sum(dtype=numpy.int64)) * width
    if bin_path.stat().st_size != expected:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes, but {index_path.name} describes {expected}: the two do "
            "not belong together, or one is truncated; preprocess the text again"
        )
    if not _follow(lengths, pointers, width) or not _rise(documents, num_sequences):
        raise damaged
    return index_path.stat().st_size == least + num_sequences


def _arrays(index: BinaryIO, num_sequences: int, num_documents: int) -> tuple[numpy.ndarray, ...]:
    """Map three arrays, unread: each sequence's length in tokens and first byte, and each document's first sequence."""
    found, place = [], _HEADER.size
    for dtype, count in ((numpy.int32, num_sequences), (numpy.int64, num_sequences), (numpy.int64, num_documents)):
        array = numpy.memmap(index, dtype=dtype, mode="r", offset=place, shape=(count,))
        found.append(array)
        place += array.nbytes
    return tuple(found)


def _follow(lengths: numpy.ndarray, pointers: numpy.ndarray, width: int) -> bool:
    """Whether every sequence starts where the one before it ends."""
    start = 0
    for first in range(0, len(lengths), _PIECE):
        part = lengths[first : first + _PIECE].astype(numpy.int64) * width
        ends = start + numpy.cumsum(part)
        if part.min() < 0 or not numpy.array_equal(ends - part, pointers[first : first + _PIECE]):
            return False
        start = ends[-1]
    return True


def _rise(documents: numpy.ndarray, num_sequences: int) -> bool:
    """Whether the documents cover all sequences, from first to last, in order."""
    if documents[0] != 0 or documents[-1] != num_sequences:
        return False
    pieces = (documents[first : first + _PIECE + 1] for first in range(0, len(documents), _PIECE))
    return all(numpy.all(numpy.diff(piece) >= 0) for piece in pieces)


_MARK = "blake3-sampled:"
_BLOCK_BYTES, _NUM_BLOCKS = 2**14, 256


def content_digest(prefix: str | Path) -> str:
    """Hash the whole index and blocks of the token file; all of the token file if it has at most 4 MiB."""
    bin_path, index_path, _ = paths_of(prefix)
    with index_path.open("rb") as index:
        return _digest(bin_path, index)


def _digest(bin_path: Path, index: BinaryIO) -> str:
    size = bin_path.stat().st_size
    digest = blake3(size.to_bytes(8, "little"), max_threads=blake3.AUTO)
    with mmap.mmap(index.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        digest.update(mapped)
    with bin_path.open("rb") as file:
        if size <= _BLOCK_BYTES * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for start in numpy.linspace(0, size - _BLOCK_BYTES, _NUM_BLOCKS, dtype=numpy.int64).tolist():
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return _MARK + digest.hexdigest()


def is_content(stored: str, prefix: str | Path) -> bool:
    """Whether a digest that this or an earlier version stored matches the pair."""
    if stored.startswith(_MARK):
        return stored == content_digest(prefix)
    return any(stored == digest for digest in _earlier_digests(prefix))


_END_BYTES = 2**20


def _earlier_digests(prefix: str | Path) -> Iterator[str]:
    """Yield the digests that earlier versions stored, cheap ones first. Those versions used the side file's hash of
    all tokens if there was one; the last digest computes that hash anew."""
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
    """Yield the digest for text, then the one for conversations."""
    yield of_tokens
    yield hashlib.sha256(of_index.digest() + bytes.fromhex(of_tokens)).hexdigest()


def _sha256(path: Path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest
