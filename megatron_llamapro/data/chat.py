"""Conversations to tokens, and which of them the assistant says: those alone get loss in an instruct stage.

The tokenizer's own chat template writes the text, as it will when the model is used. What an assistant's message adds
to the text before it, with the template's generation prompt, is the answer: that is what the model will have to
generate, the end of the turn included, without which it would never stop.
"""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path

from jinja2 import TemplateError

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.encoding import Encoder, Segment, valid_unicode
from megatron_llamapro.data.tokenizer import Tokenizer

Message = dict[str, str]
"""role and content"""

_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
_OTHER_ROLES = {"system", "user", "developer", "tool", "function"}
_NOT_A_MESSAGE = 'messages are {"role": …, "content": …} (or {"from": …, "value": …}), with text in both'


class ChatTemplate:
    """A chat template of transformers, beside a tokenizer or in a file."""

    def __init__(self, tokenizer: Path, template: Path | None = None) -> None:
        """Raises `DataError` where there is none, or transformers is not installed."""
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise DataError("chat templates are read by transformers, which is not installed: pip install it") from None
        logging.set_verbosity_error()  # it tells of models that it does not find
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer.parent, local_files_only=True)
        except Exception as error:  # of many kinds
            raise DataError(f"{tokenizer.parent}: transformers cannot read the tokenizer: {error}") from None
        self._text = _read(template) if template else None
        if self._text is None and self._tokenizer.chat_template is None:
            raise DataError(f"{tokenizer.parent} has no chat template: give one with --chat_template FILE.jinja")

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._text, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def answers(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and from which character to which it is an answer.

        Raises:
            ValueError: the template refuses the conversation, or does not write it one message after the other.
        """
        try:
            text = self.render(messages)
            spans = [self._answer(messages, number, text) for number in _assistants(messages)]
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from None
        return text, spans

    def _answer(self, messages: list[Message], number: int, text: str) -> tuple[int, int]:
        before = self.render(messages[:number], add_generation_prompt=True) if number else ""
        after = self.render(messages[: number + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"message {number + 1} changes what the chat template wrote before it, so it is not known what the "
                "assistant says: give a template that only appends with --chat_template"
            )
        return len(before), len(after)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a chat template: {error}") from None


def _assistants(messages: list[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _check_roles(messages: list[Message], where: str) -> None:
    """Where the assistant says nothing, somebody may who is it by another name."""
    unknown = sorted({message["role"] for message in messages} - _OTHER_ROLES)
    if unknown:
        raise DataError(f"{where}: no message has the role assistant, but there is '{unknown[0]}': rename what it is")


class ChatEncoder(Encoder):
    """Conversations, in segments that are answers and segments that are not."""

    def __init__(self, tokenizer: Tokenizer, json_key: str, template: ChatTemplate) -> None:
        super().__init__(tokenizer, json_key)
        self.template = template

    def segments(self, value: object, where: str) -> list[Segment]:
        """None where the assistant says nothing."""
        messages = _messages(value, f"{where}: '{self.json_key}'")
        if not _assistants(messages):
            _check_roles(messages, where)
            return []
        try:
            text, spans = self.template.answers(messages)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        ids, starts = self.tokenizer.encode_with_starts(text)
        edges = [edge for span in spans for edge in span]
        marked = [(token, bisect.bisect_right(edges, start) % 2 == 1) for token, start in zip(ids, starts, strict=True)]
        groups = itertools.groupby(marked, key=lambda pair: pair[1])
        return [Segment([token for token, _ in pairs], is_answer) for is_answer, pairs in groups]


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} holds no list of messages")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {_NOT_A_MESSAGE}")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: {_NOT_A_MESSAGE}")
    return {"role": _ROLES.get(role, role), "content": valid_unicode(content)}
