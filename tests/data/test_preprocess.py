"""Text to token files: the same files with any number of workers, complete or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import open_token_file, paths_of, read_info
from megatron_llamapro.data.tokenizer import load_tokenizer


def contents(prefix: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths_of(prefix)]


def test_documents_survive_a_round_trip(pair: Path, documents: list[str], tokenizer_folder: Path) -> None:
    """Read by megatron.core's own reader: every document is whole and ends once."""
    tokenizer = load_tokenizer(tokenizer_folder)
    dataset = open_token_file(pair)
    assert len(dataset) == len(documents)
    for index, text in enumerate(documents):
        ids = dataset[index].tolist()
        assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
        assert ids[:-1] == tokenizer.encode(text)
    info = read_info(pair)
    assert info is not None
    assert info.num_tokens == int(dataset.sequence_lengths.sum()) and info.num_documents == len(documents)


def test_any_number_of_workers_writes_the_same(pair: Path, jsonl: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    preprocess([jsonl], tmp_path / "text", tokenizer=tokenizer_folder, num_workers=3)
    assert contents(tmp_path / "text") == contents(pair)


def test_empty_documents_are_left_out(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "ab"}\n{"text": "\\ud800"}\n')
    done = preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer=tokenizer_folder)
    assert done.num_empty == 1 and done.info.num_documents == 2  # a lone surrogate is text, though unusual


BAD_LINES = {
    "not json": ("{text", "line 2: not JSON: Expecting property name enclosed in double quotes at column 2$"),
    "not an object": ("[1]", "a list, not an object with the field 'text'"),
    "no such field": (
        '{"content": "x", "a\\nb": 1}',
        r"no field 'text', but 'content', 'a\\nb': name the field to read with --json_key",
    ),
    "not text": ('{"text": 5}', "holds a number, not text"),
    "null": ('{"text": null}', "holds null, not text"),
    "a conversation": ('{"text": []}', "conversations need --chat"),
    "an empty object": ("{}", "the object is empty"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
    "an encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8: invalid continuation byte at byte 11"),
    "cut": ('{"text": "x', "not JSON: Unterminated string starting at column 10"),
    "cut after a colon": ('{"text":', "at column 9: the line ends too early"),
    "an enormous integer": (f'{{"text": "x", "id": {"7" * 5000}}}', "holds an integer of thousands of digits"),
    "nested": ("[" * 100_000, "nested too deep"),
    "only NaN": ("NaN", "a number, not an object"),
    "NaN for text": ('{"text": NaN}', "holds a number, not text"),
}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_lines_are_named(num_workers: int, tokenizer_folder: Path, tmp_path: Path) -> None:
    cases = BAD_LINES if num_workers == 1 else {"not text": BAD_LINES["not text"]}
    for line, message in cases.values():
        bad = line if isinstance(line, bytes) else line.encode()
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + bad + b"\n")
        with pytest.raises(DataError, match=message) as error:
            preprocess([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer_folder, num_workers=num_workers)
        assert "line 2" in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_refusal_leaves_the_pair_unchanged(
    copied_pair: Path, jsonl: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    before = contents(copied_pair)
    with pytest.raises(DataError, match="--overwrite"):
        preprocess([jsonl], copied_pair, tokenizer=tokenizer_folder)
    with pytest.raises(DataError, match="does not exist"):
        preprocess([tmp_path / "none.jsonl"], tmp_path / "new", tokenizer=tokenizer_folder)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="nothing to write"):
        preprocess([tmp_path / "empty.jsonl"], copied_pair, tokenizer=tokenizer_folder, overwrite=True)
    assert contents(copied_pair) == before


def test_overwrite_replaces_the_pair(copied_pair: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "new"}\n')
    preprocess([tmp_path / "a.jsonl"], copied_pair, tokenizer=tokenizer_folder, overwrite=True)
    assert len(open_token_file(copied_pair)) == 1


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from megatron_llamapro.runtime.upstream import import_megatron
import_megatron()
from megatron_llamapro.data import preprocess
def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(preprocess, sys.argv[1], killed)
preprocess.preprocess([Path(sys.argv[2])], Path(sys.argv[3]), tokenizer=Path(sys.argv[4]), overwrite=True)
"""


@pytest.mark.parametrize("where", ["_publish", "sync"])
def test_a_kill_while_writing_keeps_the_old_pair(
    where: str, copied_pair: Path, jsonl: Path, tokenizer_folder: Path
) -> None:
    """The old pair is complete until the finished files are moved into place."""
    before = contents(copied_pair)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, where, *map(str, (jsonl, copied_pair, tokenizer_folder))]
    assert subprocess.run(command, env={**os.environ}).returncode == -signal.SIGKILL
    assert contents(copied_pair) == before


def test_the_tool_writes_and_refuses_a_second_run(jsonl: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(jsonl), "--tokenizer", str(tokenizer_folder)]
    command += ["--output_prefix", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "documents" in result.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert json.loads((tmp_path / "out.json").read_text())["eod"] == 2
