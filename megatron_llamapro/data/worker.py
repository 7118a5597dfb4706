"""Preprocessing workers: which encoder they make, and what they do with a chunk.

Nothing imported here imports torch or megatron, so that they start at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_llamapro.config.errors import DataError, LlamaProError
from megatron_llamapro.data.chat import ChatEncoder, ChatTemplate
from megatron_llamapro.data.encoding import Chunk, Encoded, Encoder, TextEncoder
from megatron_llamapro.data.helpers import Helper, answers_in_order
from megatron_llamapro.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class EncoderOptions:
    """What every worker makes its encoder of."""

    tokenizer: Path
    eod_token: str | None = None
    json_key: str | None = None
    """Without it `text`, or `messages` of conversations."""
    chat: bool = False
    chat_template: Path | None = None

    def make(self) -> Encoder:
        """Raises `DataError` where the tokenizer or the chat template is missing, or cannot be used."""
        if self.chat_template and not self.chat:
            raise DataError("a chat template is for conversations: give --chat too")
        tokenizer = load_tokenizer(self.tokenizer, eod_token=self.eod_token)
        if not self.chat:
            return TextEncoder(tokenizer, self.json_key or "text")
        return ChatEncoder(tokenizer, self.json_key or "messages", ChatTemplate(tokenizer.path, self.chat_template))


def serve(connection: Connection, options: EncoderOptions) -> None:
    """Encode the chunks that come, one after the other; what is wrong with one is the answer to it."""
    encoder = options.make()
    while True:
        chunk: Chunk = connection.recv()
        try:
            answer = encoder(chunk)
        except LlamaProError as error:
            answer = error
        connection.send(answer)


def encoded(chunks: Iterable[Chunk], encoder: Encoder, options: EncoderOptions, num_workers: int) -> Iterator[Encoded]:
    """The encoded chunks, in order: by `encoder` here, or by as many workers.

    Raises:
        DataError: of a line.
        RunError: a worker was killed.
    """
    if num_workers <= 1:
        yield from map(encoder, chunks)
        return
    advice = "nothing was written; try again, where memory is short with a smaller --num_workers"
    with contextlib.ExitStack() as stack:
        names = [f"worker {number} of {num_workers}" for number in range(1, num_workers + 1)]
        helpers = [stack.enter_context(Helper(name, serve, options, advice=advice)) for name in names]
        yield from answers_in_order(helpers, chunks)
