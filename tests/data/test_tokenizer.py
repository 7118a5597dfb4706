"""Both kinds of tokenizers, and the sources of the end-of-document token."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import psutil
import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_model(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([jsonl], tmp_path_factory.mktemp("sentencepiece"), vocab_size=400)


def test_a_tokenizer_json_encodes_and_decodes(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.vocab_size == 131 and tokenizer.eod == 2
    assert tokenizer.decode(tokenizer.encode("x = [1]")) == "x = [1]"
    assert load_tokenizer(tokenizer_folder / "tokenizer.json").unique_identifiers == tokenizer.unique_identifiers


def test_a_sentencepiece_model_encodes_and_decodes(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model.parent)
    assert tokenizer.vocab_size == 400 and tokenizer.eod == 2
    text = "if x:\n    return {'é': 7}"  # byte fallback, white space kept
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3's kind: a token is a string of bytes, which may be a part of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["return the naïve value"] * 9, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


TEXTS = ("if x:\n    return {'é': 7}", "two  spaces", "naïve 日本語 🙂", "\t\n\n")


def test_the_bytes_of_tokens_are_those_of_the_text(byte_level_tokenizer: Path, sentencepiece_model: Path) -> None:
    """A sentencepiece tokenizer puts a space before a text, which is a byte more."""
    for folder, num_more in ((byte_level_tokenizer, 0), (sentencepiece_model.parent, 1)):
        tokenizer = load_tokenizer(folder)
        sizes = tokenizer.token_bytes()
        assert len(sizes) == tokenizer.vocab_size and sizes[tokenizer.eod] == 0
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert sum(sizes[index] for index in ids) == len(text.encode()) + num_more


def test_training_is_repeatable(jsonl: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    again = train_tokenizer([jsonl], tmp_path, vocab_size=400)
    assert again.read_bytes() == sentencepiece_model.read_bytes()


REFUSED: dict[str, tuple[str, bytes, int, str]] = {
    "too many tokens": ("a.txt", b"abc\n" * 100, 100_000, "tokenizer of 100000 tokens .* Vocabulary size too high"),
    "too few tokens": ("a.txt", "αβγδεζηθικλμνξοπρστυφχψω\n".encode() * 9, 260, "a tokenizer of 260 .*smaller than"),
    "fewer than bytes": ("a.txt", b"abc\n", 20, "--vocab_size is 20: give a number of tokens from 260 to 10,000,000"),
    "negative": ("a.txt", b"abc\n", -5, "--vocab_size is -5: give"),
    "absurd": ("a.txt", b"abc\n", 10**12, "--vocab_size is 1000000000000: give"),
    "empty": ("a.txt", b"", 300, "cannot train a tokenizer of 300 tokens on this text"),
    "empty lines": ("a.txt", b"\n\n", 300, "cannot train a tokenizer of 300 tokens on this text"),
    "not UTF-8": ("a.txt", b"abc\nx\xff\n", 300, r"a\.txt, line 2: not UTF-8: invalid start byte at byte 2"),
    "not JSON": ("a.jsonl", b'{"text": "abc"}\n{"text": \n', 300, r"a\.jsonl, line 2: not JSON: .* too early"),
    "no field": ("a.jsonl", b'{"content": "abc"}\n', 300, r"a\.jsonl, line 1: no field 'text', but 'content': name"),
    "no text": ("a.jsonl", b'{"text": 5}\n', 300, r"a\.jsonl, line 1: 'text' holds a number, not text"),
    "compressed": ("a.txt.gz", b"\x1f\x8b\x08", 300, "is compressed with gzip"),
    "a list of documents": ("a.json", b'[\n{"text": "a"}\n]', 300, "is a JSON list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_training_leaves_nothing(case: str, tmp_path: Path) -> None:
    name, content, vocab_size, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        train_tokenizer([tmp_path / name], tmp_path / "new" / "tokenizer", vocab_size=vocab_size)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_existing_tokenizer_is_kept(jsonl: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer([jsonl], sentencepiece_model.parent, vocab_size=400)
    with pytest.raises(DataError, match="does not exist"):
        train_tokenizer([tmp_path / "none"], tmp_path / "out", vocab_size=400)


def test_long_lines_and_odd_texts_are_trained_on(tmp_path: Path) -> None:
    """sentencepiece itself skips lines above 64 KiB and refuses lone surrogates."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "häufig " * 20_000 + "\ud800"}))
    path = train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=290)
    assert len(load_tokenizer(path).encode("häufig häufig")) <= 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_training(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM ends the tool although sentencepiece ignores it, or the system kills the process that trains."""
    words = numpy.random.default_rng(0).integers(97, 123, size=(200_000, 8), dtype=numpy.uint8)
    (tmp_path / "a.txt").write_bytes(b"\n".join(bytes(word) for word in words) * 3)
    command = [sys.executable, "tools/train_tokenizer.py", "--input", str(tmp_path / "a.txt"), "--vocab_size", "30000"]
    tool = subprocess.Popen([*command, "--output_dir", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    while not (helpers := [one for one in psutil.Process(tool.pid).children() if "spawn_main" in str(one.cmdline())]):
        assert tool.poll() is None
    (tool if number == signal.SIGTERM else helpers[0]).send_signal(number)
    _, error = tool.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert (tool.returncode, error) == (143, "error: terminated\n")
    else:
        assert tool.returncode == 75 and error.count("\n") == 1
        assert error.startswith(f"error: the training (process {helpers[0].pid}) was killed (SIGKILL), as the system")
    assert not helpers[0].is_running() and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


EOS_SOURCES = {
    "token text": ("tokenizer_config.json", {"eos_token": "</s>"}, 2),
    "token object": ("special_tokens_map.json", {"eos_token": {"content": "<s>"}}, 1),
    "one id": ("generation_config.json", {"eos_token_id": 7}, 7),
    "several ids": ("config.json", {"eos_token_id": [9, 2]}, 9),
}


@pytest.mark.parametrize("source", EOS_SOURCES)
def test_the_end_of_sequence_token_is_read_from_each_source(
    source: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
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
def test_the_end_of_sequence_token_is_that_of_transformers(
    config: dict, tokens: dict, tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert load_tokenizer(tmp_path).eod == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_a_file_that_is_not_a_tokenizer_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "other.model").write_bytes(b"no model")
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "text.txt").write_text("")
    for path, message in (
        (tmp_path, "--eod_token"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "text.txt", "not a known tokenizer"),
        (tmp_path / "other.model", "not a sentencepiece model"),
        (tmp_path / "broken.json", "not a tokenizer"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    with pytest.raises(DataError, match="no token"):
        load_tokenizer(tokenizer_folder, eod_token="<nothing>")
