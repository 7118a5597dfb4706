"""`.bin`/`.idx` pairs: checked when opened, and what is known about them kept in `<prefix>.json` beside them.

The format is megatron.core's (`IndexedDataset`), so Megatron-LM reads what we write and we read what it writes; only
the side file is ours. A document of text is one sequence. A conversation has a sequence a turn, and sequences have a
mode, as those of multimodal sets: 1 what the assistant says, 0 the rest.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.files import check_fetched
from megatron_llamapro.config.schema import DataFormat

_END_BYTES = 2**20


@dataclass(frozen=True)
class TokenFileInfo:
    """What preprocessing knew about a pair."""

    num_documents: int
    num_tokens: int
    vocab_size: int
    """Of the tokenizer."""
    max_token: int
    eod: int
    tokenizer_sha256: str
    bin_bytes: int
    bin_sha256: str
    num_answer_tokens: int | None = None
    """Of conversations: tokens that the assistant says."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, the .idx and our side file of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def read_info(prefix: str | Path) -> TokenFileInfo | None:
    """The side file, where there is one that belongs to the pair as it is now."""
    bin_path, _, info_path = paths_of(prefix)
    try:
        info = TokenFileInfo(**json.loads(info_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return info if bin_path.is_file() and info.bin_bytes == bin_path.stat().st_size else None


def open_token_file(
    prefix: str | Path, *, vocab_size: int | None = None, data_format: DataFormat = "text"
) -> IndexedDataset:
    """The pair, with its two files checked against each other and, where that is known, against the vocabulary.

    Raises:
        DataError: a file is missing, empty, damaged or another set's; it is not of `data_format`; or tokens lie beyond
            `vocab_size`.
    """
    bin_path, index_path, _ = paths_of(prefix)
    for path in (bin_path, index_path):
        if not path.is_file():
            raise DataError(f"{path} is not there: {prefix} must be the path of a .bin/.idx pair without the ending")
        check_fetched(path, error=DataError)
    has_modes = _check_sizes(bin_path, index_path)
    if has_modes and data_format == "text":
        raise DataError(f"{prefix} holds conversations: set data.format to chat, or preprocess text")
    if data_format == "chat" and not has_modes:
        raise DataError(f"{prefix} holds text: preprocess conversations with --chat, or set data.format to text")
    info = read_info(prefix)
    if info is not None and vocab_size is not None and info.max_token >= vocab_size:
        raise DataError(
            f"{prefix} holds the token {info.max_token}, but the model's vocabulary has {vocab_size}: it was made with "
            "another tokenizer; preprocess the text again"
        )
    return IndexedDataset(str(prefix), multimodal=has_modes)


def _check_sizes(bin_path: Path, index_path: Path) -> bool:
    """The sizes in the index add up to the tokens' file. megatron.core looks when it reads beyond the end, in the
    middle of training, or not at all. Returns whether the sequences have modes: a byte each at the index' end."""
    damaged = f"{index_path} is damaged: preprocess the text again"
    header = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, documents
    with index_path.open("rb") as file:
        start = file.read(header.size)
    if len(start) < header.size:
        raise DataError(damaged)
    magic, version, code, num_sequences, num_documents = header.unpack(start)
    if magic != b"MMIDIDX\x00\x00" or version != 1 or code not in DType._value2member_map_:
        raise DataError(f"{index_path} is not an index of token files, or of a version that is not known")
    least = header.size + num_sequences * (4 + 8) + num_documents * 8
    if num_sequences == 0:
        raise DataError(f"{index_path} holds no documents")
    if index_path.stat().st_size not in (least, least + num_sequences):
        raise DataError(damaged)
    lengths = numpy.fromfile(index_path, dtype=numpy.int32, count=num_sequences, offset=header.size)
    width = numpy.dtype(DType.dtype_from_code(code)).itemsize
    expected = int(lengths.sum(dtype=numpy.int64)) * width
    if bin_path.stat().st_size != expected:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes, {index_path.name} describes {expected}: the two do not "
            "belong together, or one is cut short; preprocess the text again"
        )
    return index_path.stat().st_size == least + num_sequences


def content_digest(prefix: str | Path) -> str:
    """A hash that changes when the pair's content does: the side file's (with the index, which has the answers of
    conversations), else of the index and both ends of the tokens (a whole hash of hundreds of gigabytes would delay
    every start)."""
    info = read_info(prefix)
    if info is not None and info.num_answer_tokens is None:
        return info.bin_sha256
    bin_path, index_path, _ = paths_of(prefix)
    digest = hashlib.sha256(index_path.read_bytes())
    if info is not None:
        return hashlib.sha256(digest.digest() + bytes.fromhex(info.bin_sha256)).hexdigest()
    size = bin_path.stat().st_size
    with bin_path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        digest.update(file.read(_END_BYTES))
    digest.update(str(size).encode())
    return digest.hexdigest()
