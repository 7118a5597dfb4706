"""Lines of JSON to token ids."""

from __future__ import annotations

import abc
import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.text_files import field_of, json_name, valid_unicode
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
    num_mended: int
    """Documents with lone surrogates, which are read as U+FFFD."""
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
        self._mended = False

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises `DataError` with file and line where a line is not a JSON object with what is needed under the key."""
        tokens, documents, num_empty, num_mended = array.array("i"), [], 0, 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            where = f"{chunk.path}, line {number}"
            self._mended = False
            segments = self.segments(field_of(line, self.json_key, where), where)
            num_empty += not segments
            num_mended += self._mended
            for segment in segments:
                tokens.extend(segment.ids)
            if segments:
                documents.append(tuple((len(segment.ids), segment.is_answer) for segment in segments))
        return Encoded(tokens, tuple(documents), num_empty, num_mended, chunk.num_bytes)

    @abc.abstractmethod
    def segments(self, value: object, where: str) -> list[Segment]:
        """The document's, none where there is nothing to learn from. Raises `DataError` where it is of another kind."""

    def mended(self, text: str) -> str:
        """`valid_unicode`, and a note of where it is another text."""
        valid = valid_unicode(text)
        self._mended = self._mended or valid is not text
        return valid


class TextEncoder(Encoder):
    """Text, each document ended by `eod`."""

    def segments(self, value: object, where: str) -> list[Segment]:
        if not isinstance(value, str):
            advice = "; conversations need --chat" if isinstance(value, list) else ""
            raise DataError(f"{where}: {self.json_key!r} holds {json_name(value)}, not text{advice}")
        ids = self.tokenizer.encode(self.mended(value))
        return [Segment([*ids, self.tokenizer.eod])] if ids else []
