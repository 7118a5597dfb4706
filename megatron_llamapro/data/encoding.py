"""Lines of JSON to token ids: documents of text, and conversations.

The tokenizer's own chat template writes the text of a conversation, as it does when the model is used. An assistant's
message adds its answer to the text before it, which ends with the template's generation prompt. The model will have to
generate the answer and the end of the turn, or it never stops. Only answers have loss. An assistant's message at the
very start answers nothing, for example a greeting, so it has no loss.
"""

from __future__ import annotations

import abc
import array
import itertools
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.command import in_one_line
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.files import IS_POINTER, POINTER_START
from megatron_llamapro.data.text_files import field_of, json_name, shown, valid_unicode
from megatron_llamapro.data.tokenizer import JSON_NAME, Tokenizer

CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class LineChunk:
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
    """Consecutive tokens of a document. Text has one segment, a conversation one for each turn."""

    ids: Sequence[int]
    is_answer: bool = False
    """Whether the assistant says it."""


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk's documents, end to end."""

    tokens: array.array
    documents: tuple[tuple[tuple[int, bool], ...], ...]
    """The segments of every document: the number of tokens, and whether the segment is an answer."""
    num_empty: int
    """Documents with nothing to learn from. They are left out."""
    num_mended: int
    """Documents with lone surrogates. These are read as U+FFFD."""
    num_bytes: int


def chunks_of(paths: Sequence[Path]) -> Iterator[LineChunk]:
    """Yield the files' lines in order, about a mebibyte at a time."""
    for path in paths:
        with path.open("rb") as file:
            first_line = 1
            while lines := tuple(file.readlines(CHUNK_BYTES)):
                yield LineChunk(path, first_line, lines)
                first_line += len(lines)


class Encoder(abc.ABC):
    """Turns chunks into tokens, one document a line."""

    def __init__(self, tokenizer: Tokenizer, json_key: str) -> None:
        self.tokenizer = tokenizer
        self.json_key = json_key
        self._mended = False

    def __call__(self, chunk: LineChunk) -> EncodedChunk:
        """Encode a chunk. Raise `DataError` with file and line if a line is no JSON object with a valid field."""
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
        return EncodedChunk(tokens, tuple(documents), num_empty, num_mended, chunk.num_bytes)

    @abc.abstractmethod
    def segments(self, value: object, where: str) -> list[Segment]:
        """Return a document's segments, none if it has nothing to learn from. Raise `DataError` for a wrong type."""

    def mended(self, text: str) -> str:
        """Return `valid_unicode(text)`, and note whether that changed the text."""
        valid = valid_unicode(text)
        self._mended = self._mended or valid is not text
        return valid


class TextEncoder(Encoder):
    """Encodes text. Each document ends with `eod`."""

    def segments(self, value: object, where: str) -> list[Segment]:
        if not isinstance(value, str):
            advice = "; conversations need --chat" if isinstance(value, list) else ""
            raise DataError(f"{where}: {self.json_key!r} holds {json_name(value)}, not text{advice}")
        ids = self.tokenizer.encode(self.mended(value))
        return [Segment([*ids, self.tokenizer.eod])] if ids else []


Message = dict[str, object]
"""role and content, and anything else that a template may read."""

_LONGEST_REASON = 300
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
_NOT_A_MESSAGE = 'messages are {"role": …, "content": …} (or {"from": …, "value": …}), with text in both'


class ChatTemplate:
    """A chat template of transformers, stored with a tokenizer or in a file of its own."""

    def __init__(self, tokenizer: Path, template: Path | None = None) -> None:
        """Raise `DataError` if there is no usable template, or transformers is not installed."""
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise DataError("chat templates need transformers, which is not installed: pip install it") from None
        if tokenizer.suffix == ".json" and tokenizer.name != JSON_NAME:
            raise DataError(f"{tokenizer}: conversations need a folder whose tokenizer is named {JSON_NAME}")
        logging.set_verbosity_error()  # else it warns about models that it does not find
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                tokenizer.parent, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many types
            raise DataError(f"{tokenizer.parent}: transformers cannot read the tokenizer: {error}") from None
        own = self._tokenizer.chat_template
        if isinstance(own, dict):  # several templates, some for other uses
            own = own.get("default")
        self.text = _read(template) if template else own
        if not self.text:
            raise DataError(f"{tokenizer.parent} has no chat template: give one with --chat_template FILE.jinja")
        if self.text.startswith(POINTER_START.decode()):
            raise DataError(f"the chat template {template or f'in {tokenizer.parent}'} {IS_POINTER}")
        for name in ("bos_token", "eos_token"):
            if re.search(rf"\b{name}\b", self.text) and not getattr(self._tokenizer, name):
                raise DataError(
                    f"the chat template writes {name}, but {tokenizer.parent}/tokenizer_config.json has none: add "
                    "it to that file"
                )

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation.

        Raises:
            ValueError: the template refuses it.
        """
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template's expressions may raise anything
            raise ValueError(f"the chat template refuses it: {in_one_line(error)[:_LONGEST_REASON]}") from None

    def answer(self, messages: list[Message], number: int, text: str) -> tuple[int, int]:
        """Return where message `number`'s answer starts and ends in the conversation's `text`, in characters.

        Raises:
            ValueError: the template refuses the conversation, or does not write it one message after the other.
        """
        before = self.render(messages[:number], add_generation_prompt=True)
        after = self.render(messages[: number + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"message {number + 1} changes text that the chat template wrote before it, so its answer cannot be "
                "found: give a template that only appends, with --chat_template"
            )
        return len(before), len(after)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as a chat template: {reason}") from None


class ChatEncoder(Encoder):
    """Encodes conversations into segments that are answers and segments that are not."""

    def __init__(self, tokenizer: Tokenizer, json_key: str, template: ChatTemplate) -> None:
        super().__init__(tokenizer, json_key)
        self.template = template

    def segments(self, value: object, where: str) -> list[Segment]:
        """Return the segments of a conversation, none if the assistant says nothing."""
        place = f"{where}: '{self.json_key}'"
        if not isinstance(value, list) or not value:
            raise DataError(f"{place} holds {json_name(value) if value else 'no messages'}, not a list of messages")
        read = [self._message(message, f"{place}, message {number}") for number, message in enumerate(value, 1)]
        messages = [message for message, _ in read]
        answering = [number for number, (_, is_answer) in enumerate(read) if is_answer and number]
        if not answering:
            return []
        try:
            text = self.template.render(messages)
            spans = [self.template.answer(messages, number, text) for number in answering]
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        return self._marked(self.mended(text), spans)

    def _message(self, value: object, where: str) -> tuple[Message, bool]:
        """Return a message, and whether it is an answer with loss."""
        if not isinstance(value, dict):
            raise DataError(f"{where}: {_NOT_A_MESSAGE}")
        role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
        for name in ("tool_calls", "function_call"):
            if value.get(name):
                raise DataError(f"{where} has {name}: answers must be text; leave such conversations out")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: {_NOT_A_MESSAGE}")
        role = _SHAREGPT.get(role, role)
        if role not in _ROLES and not re.search(rf"""['"]{re.escape(role)}['"]""", self.template.text):
            raise DataError(
                f"{where} has the role {shown([role])}, which is none of {', '.join(sorted(_ROLES))}: rename it"
            )
        weight = value.get("weight", 1)
        if weight not in (0, 1):
            raise DataError(
                f"{where} has the weight {reprlib.repr(weight)}: it must be 1, or 0 for an answer without loss"
            )
        others = {name: item for name, item in value.items() if name not in ("from", "value", "weight")}
        message: Message = {**others, "role": role, "content": content}
        return message, role == "assistant" and weight == 1

    def _marked(self, text: str, spans: list[tuple[int, int]]) -> list[Segment]:
        """Split `text` into segments. As in transformers, a token belongs to an answer if any of its characters does.
        Return none if no token belongs to an answer."""
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        marked, left = [], list(reversed(spans))
        for token, (start, end) in zip(ids, offsets, strict=True):
            while left and left[-1][1] <= start:
                left.pop()
            marked.append((token, bool(left) and max(end, start + 1) > left[-1][0]))
        if not any(is_answer for _, is_answer in marked):
            return []
        groups = itertools.groupby(marked, key=lambda pair: pair[1])
        return [Segment([token for token, _ in pairs], is_answer) for is_answer, pairs in groups]
