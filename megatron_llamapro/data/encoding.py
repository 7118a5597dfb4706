"""Lines of JSON to token ids: what a preprocessing worker does. Imports neither torch nor megatron, so that a worker
starts at once."""

from __future__ import annotations

import array
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.tokenizer import Tokenizer, load_tokenizer

CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Chunk:
    """Some whole lines of a file."""

    path: Path
    first_line: int
    """1-based."""
    lines: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.lines))


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents, end to end."""

    tokens: array.array
    lengths: tuple[int, ...]
    num_empty: int
    """Documents without any token, which are left out."""
    num_bytes: int


def chunks_of(paths: Sequence[Path]) -> Iterator[Chunk]:
    """The files' lines in order, about a mebibyte at a time."""
    for path in paths:
        with path.open("rb") as file:
            first_line = 1
            while lines := tuple(file.readlines(CHUNK_BYTES)):
                yield Chunk(path, first_line, lines)
                first_line += len(lines)


class Encoder:
    """Turns chunks into tokens, one document a line, each ended by `eod`."""

    def __init__(self, tokenizer: Tokenizer, json_key: str) -> None:
        self.tokenizer = tokenizer
        self.json_key = json_key

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises `DataError` with file and line where a line is not a JSON object with text under the key."""
        tokens, lengths, num_empty = array.array("i"), [], 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            ids = self.tokenizer.encode(self._text(line, f"{chunk.path}, line {number}"))
            if not ids:
                num_empty += 1
                continue
            tokens.extend(ids)
            tokens.append(self.tokenizer.eod)
            lengths.append(len(ids) + 1)
        return Encoded(tokens, tuple(lengths), num_empty, chunk.num_bytes)

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or self.json_key not in record:
            raise DataError(f"{where}: no field '{self.json_key}': name the field that holds the text with --json_key")
        text = record[self.json_key]
        if not isinstance(text, str):
            raise DataError(f"{where}: '{self.json_key}' holds {type(text).__name__}, not text")
        return text.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates, which JSON may escape


_worker_encoder: Encoder | None = None


def start_worker(tokenizer: str, eod_token: str | None, json_key: str) -> None:
    """Make this process's encoder, once."""
    global _worker_encoder
    _worker_encoder = Encoder(load_tokenizer(Path(tokenizer), eod_token=eod_token), json_key)


def encode_in_worker(chunk: Chunk) -> Encoded:
    """Encode with this process's encoder."""
    assert _worker_encoder is not None
    return _worker_encoder(chunk)
