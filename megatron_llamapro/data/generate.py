"""Text that a model writes: samples documents from a checkpoint, to replay them in a training run.

The documents of each batch are drawn with a seed of its own, and a batch is stored when it is complete. So a run that
was interrupted and resumed writes the same file as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llamapro.config.drafts import writing
from megatron_llamapro.config.errors import ConfigError, DataError
from megatron_llamapro.config.files import read_inside
from megatron_llamapro.data.samplers import (
    BATCH_SIZES,
    Progress,
    SamplerBackend,
    Sampling,
    choose_backend,
    load_sampler,
)
from megatron_llamapro.data.text_draft import TextDraft, Written, WrittenDocument, text_draft
from megatron_llamapro.data.text_files import check_text_files, field_of, json_name, valid_unicode
from megatron_llamapro.data.tokenizer import Tokenizer, load_tokenizer

_HIGHEST_TEMPERATURE = 2.0  # vLLM's
# Options that a draft depends on, beside the contents of files.
_SETTINGS = (
    "num_documents",
    "num_tokens",
    "max_document_tokens",
    "batch_size",
    "temperature",
    "top_p",
    "seed",
    "dtype",
    "eod_token",
)
_COUNTS = ("num_documents", "num_tokens", "max_document_tokens", "batch_size", "prompt_tokens")


@dataclass(frozen=True)
class TextRequest:
    """What to sample."""

    model: Path
    """Folder of a Hugging Face checkpoint, with its tokenizer."""
    num_documents: int | None = None
    num_tokens: int | None = None
    """The last document is the one that reaches this number of tokens. The end of a document counts as one."""
    max_document_tokens: int = 1024
    """Longer documents are cut."""
    batch_size: int | None = None
    """Without it, the backend's default."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str | None = None
    """Without it, the type that the weights are stored in."""
    eod_token: str | None = None
    """Token that starts and ends a document. Without it, the tokenizer's own bos (else eos) and eos."""
    prompts: Path | None = None
    """Texts as `preprocess` reads them. Each document starts with the first `prompt_tokens` of one of them, in turn."""
    prompt_tokens: int = 16
    backend: SamplerBackend | None = None
    """Without it, vLLM if it is installed and there is a GPU, else transformers."""

    def check(self, output: Path, *, overwrite: bool) -> None:
        """Check the values before work starts.

        Raises:
            ConfigError: a value is impossible, or two contradict each other.
            DataError: the output exists (unless `overwrite`), or the prompts are missing or not jsonl.
        """
        if (self.num_documents is None) == (self.num_tokens is None):
            raise ConfigError("give either --num_documents or --num_tokens")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}: it must be at least 1")
        if not 0 < self.temperature <= _HIGHEST_TEMPERATURE:
            most = f"at most {_HIGHEST_TEMPERATURE:g}"
            raise ConfigError(f"--temperature is {self.temperature:g}: it must be above 0 and {most}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p is {self.top_p:g}: it must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}: it cannot be negative")
        if self.prompts is not None:
            check_text_files([self.prompts], jsonl=True)
            if self.prompt_tokens >= self.max_document_tokens:
                most = f"--max_document_tokens, {self.max_document_tokens}"
                raise ConfigError(f"--prompt_tokens is {self.prompt_tokens}: it must be below {most}")
        _check_output(output, overwrite=overwrite)

    def is_done(self, written: Written) -> bool:
        """Whether this is as much as was requested."""
        if self.num_documents is not None:
            return written.num_documents >= self.num_documents
        return self.num_tokens is not None and written.num_tokens >= self.num_tokens


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.is_dir():
        raise DataError(f"{output} is a folder: name a file in it")
    if output.exists() and not overwrite:
        raise DataError(f"{output} exists: choose another --output, or give --overwrite")


@dataclass(frozen=True)
class GeneratedText:
    """The result of `generate_text`."""

    written: Written
    resumed: Written
    """The part that an earlier run had written."""
    start: str
    """The token that starts a document."""
    end: str
    """The token that ends it. Others that the model's files name end it too."""


def generate_text(
    request: TextRequest,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_start: Callable[[Written], object] = lambda resumed: None,
    progress: Progress = lambda num_documents, num_tokens: None,
) -> GeneratedText:
    """Sample documents from a model, and write them to `output`, one `{"text": …}` a line.

    `output` is complete or unchanged. An interrupted run leaves its complete batches in a draft beside it; `resume`
    continues that. `on_start` is called with the part that an earlier run has written.

    Raises:
        ConfigError: a value is impossible, or the backend is not installed.
        DataError: the tokenizer or the prompts cannot be used, the output exists (unless `overwrite`), or the draft
            has other settings.
        CheckpointError: another process is writing the output.
        RunError: the disk is full, or the GPU's memory ran out.
    """
    request.check(output, overwrite=overwrite)
    backend = choose_backend(request.backend)
    request = replace(request, backend=backend, batch_size=request.batch_size or BATCH_SIZES[backend])
    tokenizer = load_tokenizer(request.model, eod_token=request.eod_token)
    starts = _starts(request, tokenizer)
    sampling = Sampling(
        ends=frozenset({starts[0][0], *tokenizer.all_ends}),
        vocab_size=tokenizer.vocab_size,
        max_document_tokens=request.max_document_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
    )
    with writing(output), text_draft(output, _settings(request, tokenizer, sampling, starts), resume=resume) as draft:
        resumed = draft.written
        on_start(resumed)
        _write_batches(request, draft, sampling, tokenizer, starts, progress)
        _check_output(output, overwrite=overwrite)
        draft.publish(output)
    start, end = (tokenizer.decode([token]) or str(token) for token in (starts[0][0], tokenizer.eod))
    return GeneratedText(draft.written, resumed, start, end)


def _write_batches(
    request: TextRequest,
    draft: TextDraft,
    sampling: Sampling,
    tokenizer: Tokenizer,
    starts: list[list[int]],
    progress: Progress,
) -> None:
    """Complete the draft. `starts` are the first ids of documents, used in turn."""
    sampler = None
    while not request.is_done(draft.written):
        sampler = sampler or load_sampler(request.backend, request.model, sampling, dtype=request.dtype)
        first, size = draft.written.num_documents, request.batch_size or 1
        if request.num_documents is not None:
            size = min(size, request.num_documents - first)
        begun = [starts[number % len(starts)] for number in range(first, first + size)]
        ids = sampler.sample(begun, seed=(request.seed, draft.num_batches), progress=progress)
        written, documents = draft.written, []
        for start, more in zip(begun, ids, strict=True):
            if request.is_done(written):
                break
            documents.append(_document(start[1:], more, sampling, tokenizer))
            written += Written(1, documents[-1].num_tokens)
        draft.add(documents)


def _document(prompt: list[int], ids: list[int], sampling: Sampling, tokenizer: Tokenizer) -> WrittenDocument:
    end = next((place for place, token in enumerate(ids) if token in sampling.ends), None)
    text = tokenizer.decode([*prompt, *ids[:end]])
    if end is None:
        text = text.rstrip("\ufffd")  # a letter of which only some bytes were drawn
    return WrittenDocument(text, len(prompt) + len(ids), is_cut=end is None)


def _starts(request: TextRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids that documents start with: the start token, and with prompts, the first tokens of each. All have
    the same length."""
    bos = None if request.eod_token else tokenizer.bos
    start = tokenizer.eod if bos is None else bos
    if request.prompts is None:
        return [[start]]
    texts = [tokenizer.encode(text)[: request.prompt_tokens] for text in _texts(request.prompts)]
    starts = [[start, *ids] for ids in texts if len(ids) == request.prompt_tokens]
    if not starts:
        raise DataError(
            f"{request.prompts}: none of its {len(texts)} texts has {request.prompt_tokens} tokens: give longer texts, "
            "or a smaller --prompt_tokens"
        )
    return starts


def _texts(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            text = field_of(line, "text", where) if line.strip() else ""
            if not isinstance(text, str):
                raise DataError(f"{where}: 'text' holds {json_name(text)}, not text")
            yield valid_unicode(text)


def _settings(
    request: TextRequest, tokenizer: Tokenizer, sampling: Sampling, starts: list[list[int]]
) -> dict[str, object]:
    """Return everything that a draft depends on, with contents of files in place of their paths."""
    contents = {
        "config.json": read_inside(request.model, "config.json") or b"",
        "starts of documents": json.dumps(starts).encode(),
        "ends of documents": json.dumps(sorted(sampling.ends)).encode(),
    }
    return {
        "tokenizer": tokenizer.digest,
        "size of the weights": sum(path.stat().st_size for path in request.model.glob("*.safetensors")),
        **{name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "backend": (request.backend or SamplerBackend.TRANSFORMERS).value,
        **{name: getattr(request, name) for name in _SETTINGS},
    }
