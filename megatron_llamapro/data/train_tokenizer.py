"""Train a sentencepiece tokenizer of LLaMA's kind: BPE with bytes to fall back on, ids 0 unknown, 1 begin, 2 end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.files import check_fetched
from megatron_llamapro.data.tokenizer import MODEL_NAME


def train_tokenizer(
    inputs: Sequence[Path], output_dir: Path, *, vocab_size: int, json_key: str = "text", overwrite: bool = False
) -> Path:
    """Train on text files, or .jsonl with the text under `json_key`, and write `output_dir/tokenizer.model`.

    Raises:
        DataError: an input cannot be read, the vocabulary is too large or too small for it, or the model is there
            already (unless `overwrite`).
    """
    target = output_dir / MODEL_NAME
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists: choose another --output_dir, or give --overwrite")
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path} is not there: give text or jsonl files")
        check_fetched(path, error=DataError)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".training-") as folder:
        draft = Path(folder) / MODEL_NAME
        _train(_sentences(inputs, json_key), draft, vocab_size)
        draft.replace(target)
    return target


def _train(sentences: Iterator[str], draft: Path, vocab_size: int) -> None:
    from sentencepiece import SentencePieceTrainer

    try:
        with draft.open("wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=file,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",  # code's white space and text's letters stay as they are
                remove_extra_whitespaces=False,
                split_digits=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                max_sentence_length=2**16,
                num_threads=1,  # the same model from the same text
                minloglevel=2,
            )
    except RuntimeError as error:
        raise DataError(f"no tokenizer of {vocab_size} tokens can be made of this text: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """sentencepiece's own words, without the place in its source."""
    return str(error).rpartition("] ")[2].strip() or "there is too little of it"


def _sentences(inputs: Sequence[Path], json_key: str) -> Iterator[str]:
    for path in inputs:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                text = _text(line, json_key, f"{path}, line {number}") if path.suffix == ".jsonl" else line
                yield from filter(None, text.splitlines())


def _text(line: str, json_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    text = record.get(json_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: no text in the field '{json_key}': name the field with --json_key")
    return text
