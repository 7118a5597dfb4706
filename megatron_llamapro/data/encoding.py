"""Lines of JSON to token ids."""

from __future__ import annotations

import abc
import array
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.tokenizer import Tokenizer

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
class Segment:
    """Consecutive tokens of a document; text has one, a conversation one of every turn."""

    ids: Sequence[int]
    is_answer: bool = False
    """Whether the assistant says it."""


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents, end to end."""

    tokens: array.array
    documents: tuple[tuple[tuple[int, bool], ...], ...]
    """Of every document the segments: number of tokens, and whether it is an answer."""
    num_empty: int
    """Documents that there is nothing to learn from, which are left out."""
    num_bytes: int


def chunks_of(paths: Sequence[Path]) -> Iterator[Chunk]:
    """The files' lines in order, about a mebibyte at a time."""
    for path in paths:
        with path.open("rb") as file:
            first_line = 1
            while lines := tuple(file.readlines(CHUNK_BYTES)):
                yield Chunk(path, first_line, lines)
                first_line += len(lines)


class Encoder(abc.ABC):
    """Turns chunks into tokens, one document a line."""

    def __init__(self, tokenizer: Tokenizer, json_key: str) -> None:
        self.tokenizer = tokenizer
        self.json_key = json_key

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises `DataError` with file and line where a line is not a JSON object with what is needed under the key."""
        tokens, documents, num_empty = array.array("i"), [], 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            where = f"{chunk.path}, line {number}"
            segments = self.segments(self._value(line, where), where)
            num_empty += not segments
            for segment in segments:
                tokens.extend(segment.ids)
            if segments:
                documents.append(tuple((len(segment.ids), segment.is_answer) for segment in segments))
        return Encoded(tokens, tuple(documents), num_empty, chunk.num_bytes)

    @abc.abstractmethod
    def segments(self, value: object, where: str) -> list[Segment]:
        """The document's, none where there is nothing to learn from. Raises `DataError` where it is of another kind."""

    def _value(self, line: bytes, where: str) -> object:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or self.json_key not in record:
            raise DataError(f"{where}: no field '{self.json_key}': name the field to read with --json_key")
        return record[self.json_key]


class TextEncoder(Encoder):
    """Text, each document ended by `eod`."""

    def segments(self, value: object, where: str) -> list[Segment]:
        if not isinstance(value, str):
            raise DataError(f"{where}: '{self.json_key}' holds {type(value).__name__}, not text")
        ids = self.tokenizer.encode(valid_unicode(value))
        return [Segment([*ids, self.tokenizer.eod])] if ids else []


def valid_unicode(text: str) -> str:
    """Without lone surrogates, which JSON may escape and no tokenizer takes."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
