"""Training of a LLaMA-style sentencepiece tokenizer: BPE with byte fallback; ids 0 unknown, 1 begin, 2 end."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_llamapro.config.drafts import folder_made, writing
from megatron_llamapro.config.errors import DataError, LlamaProError
from megatron_llamapro.data.text_files import check_text_files, decoded, field_of, is_jsonl, json_name, valid_unicode
from megatron_llamapro.data.tokenizer import MODEL_NAME
from megatron_llamapro.data.workers import Helper

_LEAST, _MOST = 260, 10_000_000  # tokens; the least are the 256 bytes, three special tokens, and one to learn
_LONGEST_BYTES = 2**16
"""Longest sentence. sentencepiece silently drops longer ones."""


def train_tokenizer(
    inputs: Sequence[Path], output_dir: Path, *, vocab_size: int, json_key: str = "text", overwrite: bool = False
) -> Path:
    """Train on text files, or .jsonl with the text under `json_key`, and write `output_dir/tokenizer.model`.

    Raises:
        DataError: an input cannot be read, the vocabulary is too large or too small for the text, or the model exists
            already (unless `overwrite`).
        RunError: the disk is full, or the training process was killed.
    """
    target = output_dir / MODEL_NAME
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists: choose another --output_dir, or give --overwrite")
    if not _LEAST <= vocab_size <= _MOST:
        raise DataError(f"--vocab_size is {vocab_size}: give a number of tokens from {_LEAST} to {_MOST:,}")
    check_text_files(inputs)
    advice = "nothing was written; try again, with less text if memory is short"
    # Train in another process: Python cannot handle Ctrl-C or SIGTERM while sentencepiece trains.
    with (
        writing(target),
        folder_made(output_dir),
        Helper("the training", _train, inputs, json_key, vocab_size, advice=advice) as helper,
    ):
        model = helper.receive()
        if isinstance(model, LlamaProError):
            raise model
        _write(target, model)
    return target


def _write(target: Path, model: bytes) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(model)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _train(connection: Connection, inputs: Sequence[Path], json_key: str, vocab_size: int) -> None:
    """Train, and send the model or the error."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    sentences = _Sentences(inputs, json_key)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",  # keep white space in code, and letters in text, unchanged
            remove_extra_whitespaces=False,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=_LONGEST_BYTES,
            num_threads=1,  # deterministic: the same text gives the same model
            minloglevel=2,
        )
    except RuntimeError as error:
        if sentences.error is not None:
            raise sentences.error from None
        raise DataError(f"cannot train a tokenizer of {vocab_size} tokens on this text: {_reason(error)}") from None
    connection.send(model.getvalue())


def _reason(error: RuntimeError) -> str:
    """Return sentencepiece's message, without the position in its source."""
    return str(error).rpartition("] ")[2].strip() or "there is too little of it"


class _Sentences:
    """The lines of the texts. sentencepiece replaces an error raised here by its own, so `error` keeps it."""

    def __init__(self, inputs: Sequence[Path], json_key: str) -> None:
        self.inputs, self.json_key = inputs, json_key
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for path in self.inputs:
                yield from self._of(path)
        except (DataError, OSError) as error:
            self.error = error
            raise

    def _of(self, path: Path) -> Iterator[str]:
        jsonl = is_jsonl(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                text = self._text(line, where) if jsonl and line.strip() else decoded(line, where)
                for sentence in text.splitlines():
                    yield from _pieces(valid_unicode(sentence))

    def _text(self, line: bytes, where: str) -> str:
        text = field_of(line, self.json_key, where)
        if not isinstance(text, str):
            raise DataError(f"{where}: {self.json_key!r} holds {json_name(text)}, not text")
        return text


def _pieces(sentence: str) -> Iterator[str]:
    """Yield the sentence in pieces that sentencepiece accepts; none if it is empty."""
    step = len(sentence) if len(sentence.encode()) <= _LONGEST_BYTES else _LONGEST_BYTES // 4  # a letter is 4 at most
    yield from (sentence[start : start + step] for start in range(0, len(sentence), step or 1))
