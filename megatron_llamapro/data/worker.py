"""A preprocessing worker: which encoder it makes, and what it does with a chunk. It imports neither torch nor megatron,
so that it starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.chat import ChatEncoder, ChatTemplate
from megatron_llamapro.data.encoding import Chunk, Encoded, Encoder, TextEncoder
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


_worker_encoder: Encoder | None = None


def start_worker(options: EncoderOptions) -> None:
    """Make this process's encoder, once."""
    global _worker_encoder
    _worker_encoder = options.make()


def encode_in_worker(chunk: Chunk) -> Encoded:
    """Encode with this process's encoder."""
    assert _worker_encoder is not None
    return _worker_encoder(chunk)
