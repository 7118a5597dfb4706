"""Both kinds of tokenizers, and where the end of a document is read from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_model(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([jsonl], tmp_path_factory.mktemp("sentencepiece"), vocab_size=400)


def test_json(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.vocab_size == 131 and tokenizer.eod == 2
    assert tokenizer.decode(tokenizer.encode("x = [1]")) == "x = [1]"
    assert load_tokenizer(tokenizer_folder / "tokenizer.json").unique_identifiers == tokenizer.unique_identifiers


def test_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model.parent)
    assert tokenizer.vocab_size == 400 and tokenizer.eod == 2
    text = "if x:\n    return {'é': 7}"  # bytes to fall back on, white space kept
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_training_is_repeatable(jsonl: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    again = train_tokenizer([jsonl], tmp_path, vocab_size=400)
    assert again.read_bytes() == sentencepiece_model.read_bytes()


def test_training_refusals(jsonl: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer of 100000 tokens"):
        train_tokenizer([jsonl], tmp_path, vocab_size=100_000)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer([jsonl], sentencepiece_model.parent, vocab_size=400)
    with pytest.raises(DataError, match="not there"):
        train_tokenizer([tmp_path / "none"], tmp_path / "out", vocab_size=400)


EOS_SOURCES = {
    "token text": ("tokenizer_config.json", {"eos_token": "</s>"}, 2),
    "token object": ("special_tokens_map.json", {"eos_token": {"content": "<s>"}}, 1),
    "one id": ("generation_config.json", {"eos_token_id": 7}, 7),
    "several ids": ("config.json", {"eos_token_id": [9, 2]}, 9),
}


@pytest.mark.parametrize("source", EOS_SOURCES)
def test_where_the_end_of_sequence_is_read(source: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    name, content, expected = EOS_SOURCES[source]
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eod == expected
    assert load_tokenizer(tmp_path, eod_token="a").eod == load_tokenizer(tmp_path).encode("a")[0]


ADDED = {str(i): {"content": word, "special": True} for i, word in enumerate(["<unk>", "<s>", "</s>"])}
EOS_FILES = {
    "of one file": ({"eos_token": "<s>"}, {}),
    "of the other": ({}, {"eos_token": "<s>"}),
    "of null and text": ({"eos_token": None}, {"eos_token": "<s>"}),
    "of both, which differ": ({"eos_token": "</s>"}, {"eos_token": "<s>"}),
    "of both, which differ, with a table": ({"eos_token": "</s>", "added_tokens_decoder": ADDED}, {"eos_token": "<s>"}),
}


@pytest.mark.parametrize(("config", "tokens"), EOS_FILES.values(), ids=EOS_FILES.keys())
def test_the_end_of_sequence_is_that_of_transformers(
    config: dict, tokens: dict, tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert load_tokenizer(tmp_path).eod == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_refusals(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "other.model").write_bytes(b"no model")
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "text.txt").write_text("")
    for path, message in (
        (tmp_path, "--eod_token"),
        (tmp_path / "none", "not there"),
        (tmp_path / "text.txt", "no known tokenizer"),
        (tmp_path / "other.model", "not a sentencepiece model"),
        (tmp_path / "broken.json", "not a tokenizer"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    with pytest.raises(DataError, match="no token"):
        load_tokenizer(tokenizer_folder, eod_token="<nothing>")
