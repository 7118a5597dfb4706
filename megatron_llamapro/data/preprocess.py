"""Text to `.bin/.idx`: turns jsonl into megatron.core's token files, in several processes, completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_llamapro.config.drafts import draft_folder, sync, writing
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.encoding import EncodedChunk, chunks_of
from megatron_llamapro.data.text_files import check_request, paths_of
from megatron_llamapro.data.token_files import TokenFileInfo
from megatron_llamapro.data.tokenizer import Tokenizer
from megatron_llamapro.data.workers import EncoderOptions, encoded
from megatron_llamapro.runtime.upstream import import_megatron


@dataclass(frozen=True)
class Preprocessed:
    """The token files that were written."""

    info: TokenFileInfo
    num_empty: int
    """Documents without text, or conversations without an answer. They are left out."""
    num_mended: int
    """Documents with lone surrogates. These are read as U+FFFD."""

    @property
    def summary(self) -> str:
        """One line for people."""
        answers = self.info.num_answer_tokens
        kind, wanted = ("documents", "text") if answers is None else ("conversations", "an answer")
        empty = f", {self.num_empty:,} without {wanted} left out" if self.num_empty else ""
        mended = f", {self.num_mended:,} with lone surrogates (read as U+FFFD)" if self.num_mended else ""
        marked = "" if answers is None else f" ({answers:,} of answers)"
        return f"{self.info.num_documents:,} {kind}{empty}{mended}, {self.info.num_tokens:,} tokens{marked}"


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    *,
    tokenizer: Path,
    json_key: str | None = None,
    eod_token: str | None = None,
    chat: bool = False,
    chat_template: Path | None = None,
    num_workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Preprocessed:
    """Tokenize jsonl files (one document a line) into `<output_prefix>.bin` and `.idx`.

    With `chat`, each document is a conversation. The tokenizer's chat template writes its text, or the template in the
    file `chat_template`. Each turn is one sequence; its mode is 1 if the assistant says it, else 0. The output has the
    same bytes for any number of workers. `progress` is called with the number of input bytes done since the last call.

    Raises:
        DataError: an input, the tokenizer or the chat template is missing or damaged, nothing is left to write, or the
            output exists already (unless `overwrite`).
        RunError: the disk is full, or a worker was killed.
    """
    check_request(inputs, output_prefix, tokenizer=tokenizer, num_workers=num_workers, overwrite=overwrite)
    options = EncoderOptions(tokenizer, eod_token, json_key, chat, chat_template)
    encoder = options.make()
    parts = encoded(chunks_of(inputs), encoder, options, num_workers)
    with writing(output_prefix), draft_folder(output_prefix) as folder, contextlib.closing(parts):
        num_empty = num_mended = 0
        draft = folder / output_prefix.name
        with contextlib.closing(_Writer(draft, encoder.tokenizer, chat=chat)) as writer:
            for part in parts:
                writer.add(part)
                num_empty += part.num_empty
                num_mended += part.num_mended
                progress(part.num_bytes)
            if not writer.num_documents:
                wanted = "conversations with an answer" if chat else "documents with text"
                raise DataError(f"{', '.join(map(str, inputs))}: no {wanted}, so there is nothing to write")
            info = writer.finish()
        _publish(draft, output_prefix, info)
    return Preprocessed(info, num_empty, num_mended)


class _Writer:
    """Appends documents to a draft pair, and counts for the side file."""

    def __init__(self, draft: Path, tokenizer: Tokenizer, *, chat: bool) -> None:
        self.draft = draft
        self.tokenizer = tokenizer
        self.chat = chat
        import_megatron()  # takes seconds, so it comes after all checks
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.builder = IndexedDatasetBuilder(str(paths_of(draft)[0]), dtype=self.dtype, multimodal=chat)
        self.digest = hashlib.sha256()
        self.num_documents = self.num_tokens = self.num_answer_tokens = self.max_token = 0

    def add(self, part: EncodedChunk) -> None:
        tokens = numpy.frombuffer(part.tokens, dtype=numpy.int32) if part.tokens else numpy.empty(0, numpy.int32)
        if not len(tokens):
            return
        if tokens.min() < 0 or tokens.max() >= self.tokenizer.vocab_size:
            raise DataError(f"the tokenizer gave the token {tokens.max()}, but it has {self.tokenizer.vocab_size} ids")
        tokens = tokens.astype(self.dtype)
        first = 0
        for segments in part.documents:
            lengths, modes = [length for length, _ in segments], [int(is_answer) for _, is_answer in segments]
            self.builder.add_document(tokens[first : first + sum(lengths)], lengths, modes)
            first += sum(lengths)
            self.num_answer_tokens += sum(length for length, is_answer in segments if is_answer)
        self.digest.update(tokens.tobytes())
        self.num_documents += len(part.documents)
        self.num_tokens += len(tokens)
        self.max_token = max(self.max_token, int(tokens.max()))

    def close(self) -> None:
        """Close the draft. megatron.core's builder closes it only in `finalize`."""
        self.builder.data_file.close()

    def finish(self) -> TokenFileInfo:
        self.builder.finalize(str(paths_of(self.draft)[1]))
        return TokenFileInfo(
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            vocab_size=self.tokenizer.vocab_size,
            max_token=self.max_token,
            eod=self.tokenizer.eod,
            tokenizer_sha256=self.tokenizer.digest,
            bin_bytes=paths_of(self.draft)[0].stat().st_size,
            bin_sha256=self.digest.hexdigest(),
            num_answer_tokens=self.num_answer_tokens if self.chat else None,
        )


def _publish(draft: Path, output_prefix: Path, info: TokenFileInfo) -> None:
    """Move the pair into place. The old index is removed first and the new one moved last, so an index on disk always
    belongs to a complete pair."""
    info.write(paths_of(draft)[2])
    new_bin, new_index, new_info = paths_of(draft)
    for path in (new_bin, new_index, new_info):
        sync(path)
    old_bin, old_index, old_info = paths_of(output_prefix)
    old_index.unlink(missing_ok=True)
    new_bin.replace(old_bin)
    new_info.replace(old_info)
    new_index.replace(old_index)
    sync(output_prefix.parent)
