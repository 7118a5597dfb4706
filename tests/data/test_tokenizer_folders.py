"""Files in place of a tokenizer or of text that are neither, and other files in a tokenizer's folder."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.encoding import ChatTemplate
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import open_token_file
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.data.train_tokenizer import train_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 9976576152\n"


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_refused(name: str, folder: Path) -> None:
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(POINTER)
    for path in (folder, folder / name) if name != "tokenizer_config.json" else (folder,):
        with pytest.raises(DataError, match=rf"{name} is a Git-LFS pointer.*`git lfs pull`"):
            load_tokenizer(path)


def test_a_chat_template_that_is_a_git_lfs_pointer_is_refused(folder: Path, tmp_path: Path) -> None:
    """Otherwise it would be a template without a placeholder."""
    (folder / "chat_template.jinja").write_text(POINTER)
    (tmp_path / "other.jinja").write_text(POINTER)
    for template in (None, tmp_path / "other.jinja"):
        with pytest.raises(DataError, match=r"chat template .* is a Git-LFS pointer"):
            ChatTemplate(folder / "tokenizer.json", template)


@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".bin", ".idx"])
def test_text_and_tokens_that_are_git_lfs_pointers_are_refused(
    ending: str, copied_pair: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Otherwise a tokenizer would be trained on them."""
    path = Path(f"{copied_pair}{ending}")
    path.write_text(POINTER)
    read: dict[str, Callable[[], object]] = {
        ".jsonl": lambda: preprocess([path], tmp_path / "new", tokenizer=tokenizer_folder),
        ".txt": lambda: train_tokenizer([path], tmp_path / "new", vocab_size=300),
        ".bin": lambda: open_token_file(copied_pair),
        ".idx": lambda: open_token_file(copied_pair),
    }
    with pytest.raises(DataError, match=rf"copy{ending} is a Git-LFS pointer"):
        read[ending]()
    assert not (tmp_path / "new").exists()


def test_the_folders_code_is_neither_run_nor_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default transformers asks on the terminal, and runs the code if the answer is yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    with pytest.raises(DataError, match="transformers cannot read the tokenizer") as refusal:
        ChatTemplate(folder / "tokenizer.json")
    assert "trust_remote_code" in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_a_tokenizer_names_the_one_beside_it(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"is not a tokenizer: .*: give {folder}/tokenizer\.json"):
        load_tokenizer(folder / "tokenizer_config.json")


def test_the_advice_for_a_vocabulary_with_merges_works(tmp_path: Path) -> None:
    """Run the command of the message, then load the tokenizer."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(DataError, match=r"it has vocab\.json: convert that to a tokenizer\.json") as refusal:
        load_tokenizer(tmp_path)
    assert "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)" in str(refusal.value)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new", eod_token="<|endoftext|>").encode("abba") == [2, 1, 0]


def test_tiktokens_file_is_not_taken_for_a_sentencepiece_model(folder: Path) -> None:
    """Meta's own Llama 3 folders name it tokenizer.model."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(DataError, match=r"not a sentencepiece model: it is tiktoken's.*tokenizer\.json"):
        load_tokenizer(folder)
