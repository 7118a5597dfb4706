"""llamapro generate-text as a user types it: its output, its errors, and what an interrupt says."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import programs
from megatron_llamapro.config.drafts import draft_of

GENERATE = ("-m", "megatron_llamapro", "generate-text", "--model")


def test_it_writes_a_line_per_document_and_prints_a_summary(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "text.jsonl"
    options = ("--output", output, "--num_documents", "5", "--batch_size", "2", "--max_document_tokens", "20")
    done = programs.run(*GENERATE, tiny_llama(), *options, "--temperature", "0.8", "--top_p", "0.9", "--dtype", "bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert [sorted(json.loads(line)) for line in output.read_text().splitlines()] == [["text"]] * 5
    assert re.match(rf"{output}: 5 documents, \d+ tokens, in [\d.]+ s \([\d,]+ tokens/s\)\n", done.stdout)
    assert "they start with '<s>' and end with '</s>'\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupt_says_how_to_continue(
    number: signal.Signals, code: int, word: str, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    output, errors = tmp_path / "text.jsonl", tmp_path / "errors"
    options = ("--output", output, "--num_documents", "1000000", "--batch_size", "1", "--max_document_tokens", "20")
    program = programs.Program(*GENERATE, tiny_llama(), *options, output=tmp_path / "out", errors=errors)
    try:
        batches = draft_of(output) / "batches.jsonl"
        while program.poll() is None and not (batches.is_file() and len(batches.read_bytes().splitlines()) > 2):
            time.sleep(0.05)
        os.kill(program.pid, number)
        assert program.wait(60) == code
    finally:
        program.kill()
    assert errors.read_text() == f"error: {word}: to continue, run the same command with --resume\n"
    assert not output.exists() and batches.is_file()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_one_line(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--num_tokens", "9", "--max_document_tokens", "9", "--backend", "vllm")
    done = programs.run(*GENERATE, tiny_llama(), "--output", tmp_path / "new" / "text.jsonl", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "vllm, which samples the text, is not installed: pip install vllm, or give --backend" in done.stderr
    assert not any(tmp_path.iterdir())
