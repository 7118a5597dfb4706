"""Text that a model writes: the same file whatever interrupted the run, and a file that `preprocess` reads."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_llamapro.config.drafts import draft_of, locked
from megatron_llamapro.config.errors import CheckpointError, ConfigError, DataError
from megatron_llamapro.data.generate import TextRequest, generate_text
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import open_token_file
from megatron_llamapro.data.tokenizer import load_tokenizer

SIZES = {"batch_size": 4, "max_document_tokens": 20}


@pytest.fixture
def request_(tiny_llama: Callable[..., Path]) -> TextRequest:
    """Four batches, the last of two documents. Every token of the model is a character or a special token."""
    return TextRequest(tiny_llama(vocab_size=98), num_documents=14, **SIZES)


@pytest.fixture
def expected(request_: TextRequest, tmp_path: Path) -> bytes:
    """Return the text of a run that nothing interrupts."""
    generate_text(request_, tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture
def damaged(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the model and changes fields of its JSON files; None removes one."""

    def copy(**changes: dict) -> Path:
        folder = shutil.copytree(tiny_llama(), tmp_path / "model")
        for name, fields in changes.items():
            path = folder / f"{name}.json"
            content = {**(json.loads(path.read_text()) if path.is_file() else {}), **fields}
            path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return folder

    return copy


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def interrupt_after(num_documents: int) -> Callable[[int, int], None]:
    """Return a `progress` that raises `KeyboardInterrupt` when this many documents have ended."""
    ended = 0

    def progress(num_ended: int, num_tokens: int) -> None:
        nonlocal ended
        ended += num_ended
        if ended >= num_documents:
            raise KeyboardInterrupt

    return progress


def test_preprocess_reads_what_was_generated(request_: TextRequest, tmp_path: Path) -> None:
    done = generate_text(request_, tmp_path / "text.jsonl")
    assert done.written.num_documents == 14 and done.resumed.num_documents == 0
    assert (done.start, done.end) == ("<s>", "</s>")
    tokenized = preprocess([tmp_path / "text.jsonl"], tmp_path / "text", tokenizer=request_.model)
    # `preprocess` also ends the documents that were cut.
    assert tokenized.info.num_tokens == done.written.num_tokens + done.written.num_cut
    assert tokenized.info.num_documents == 14 == len(open_token_file(tmp_path / "text"))
    assert 0 < done.written.num_cut < 14


@pytest.mark.parametrize("num_documents", [1, 6, 13])
def test_an_interrupted_run_resumes_to_the_same_file(
    num_documents: int, request_: TextRequest, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "text.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_text(request_, output, progress=interrupt_after(num_documents))
    assert not output.exists() and draft_of(output).exists() == (num_documents > 4)
    done = generate_text(request_, output, resume=True)
    assert output.read_bytes() == expected
    assert done.resumed.num_documents == num_documents // 4 * 4
    assert not draft_of(output).exists()


DAMAGES: dict[str, Callable[[bytes, bytes], tuple[bytes, bytes]]] = {
    "the text is cut": lambda text, batches: (text[: len(text) // 2], batches),
    "the text is gone": lambda text, batches: (b"", batches),
    "the list is cut in a line": lambda text, batches: (text, batches[:-5]),
    "the list is cut in the settings": lambda text, batches: (text, batches[:5]),
    "the list is zeros": lambda text, batches: (text, b"\0" * 19 + b"\n" + batches.split(b"\n", 1)[1]),
    "the list ends in zeros": lambda text, batches: (text, batches[:-20] + b"\0" * 19 + b"\n"),
    "half a batch is too much": lambda text, batches: (text + text[:30], batches),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_draft_resumes_from_its_complete_batches(
    damage: str, request_: TextRequest, expected: bytes, tmp_path: Path
) -> None:
    output, draft = tmp_path / "text.jsonl", draft_of(tmp_path / "text.jsonl")
    with pytest.raises(KeyboardInterrupt):
        generate_text(request_, output, progress=interrupt_after(13))
    paths = draft / "text.jsonl", draft / "batches.jsonl"
    for path, content in zip(paths, DAMAGES[damage](*(path.read_bytes() for path in paths)), strict=True):
        path.write_bytes(content)
    done = generate_text(request_, output, resume=True)
    assert output.read_bytes() == expected
    assert done.resumed.num_documents < 12 or damage == "half a batch is too much"


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_llamapro.data import generate, text_draft
sync = text_draft.sync
def killed(path):
    sync(path)
    if path.name == "text.jsonl" and path.stat().st_size > 200:
        os.kill(os.getpid(), signal.SIGKILL)
text_draft.sync = killed
request = generate.TextRequest(Path(sys.argv[1]), num_documents=14, batch_size=4, max_document_tokens=20)
generate.generate_text(request, Path(sys.argv[2]))
"""


def test_a_killed_run_resumes_to_the_same_file(request_: TextRequest, expected: bytes, tmp_path: Path) -> None:
    """The kill comes between the text of a batch and its line in the list."""
    output = tmp_path / "text.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(request_.model), str(output)])
    assert done.returncode == -signal.SIGKILL and not output.exists()
    assert 0 < generate_text(request_, output, resume=True).resumed.num_documents < 14
    assert output.read_bytes() == expected


def test_a_number_of_tokens_ends_with_the_document_that_reaches_it(
    request_: TextRequest, expected: bytes, tmp_path: Path
) -> None:
    """The documents are the first ones of a longer run."""
    output = tmp_path / "text.jsonl"
    done = generate_text(replace(request_, num_documents=None, num_tokens=100), output)
    lines = output.read_bytes().splitlines()
    assert lines == expected.splitlines()[: len(lines)]
    assert done.written.num_documents == len(lines) % 14 and 100 <= done.written.num_tokens < 120


def test_prompts_start_the_documents_in_turn(request_: TextRequest, tmp_path: Path) -> None:
    prompts = ["The first one.", "short", "Second, of several", "A third text"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    steered = replace(request_, num_documents=7, prompts=tmp_path / "p.jsonl", prompt_tokens=8)
    done = generate_text(steered, tmp_path / "text.jsonl")
    found = texts(tmp_path / "text.jsonl")
    assert [text[:8] for text in found] == (["The firs", "Second, ", "A third "] * 3)[:7]
    lengths = [len(load_tokenizer(steered.model).encode(text)) for text in found]
    assert max(lengths) == 20
    assert done.written.num_tokens + done.written.num_cut == sum(length + 1 for length in lengths)


def test_the_start_of_a_document_is_the_tokenizers_or_the_given_one(
    damaged: Callable[..., Path], tmp_path: Path
) -> None:
    model = damaged(tokenizer_config={"bos_token": None}, config={"bos_token_id": None, "eos_token_id": [5, 6]})
    (model / "generation_config.json").unlink(missing_ok=True)
    request = TextRequest(model, num_documents=1, **SIZES)
    done = generate_text(request, tmp_path / "a.jsonl")
    assert (done.start, done.end) == ("</s>", "</s>")
    assert load_tokenizer(model).all_ends == {2, 5, 6}
    done = generate_text(replace(request, eod_token="<unk>"), tmp_path / "b.jsonl")
    assert (done.start, done.end) == ("<unk>", "<unk>")


def test_a_model_without_document_tokens_is_refused(damaged: Callable[..., Path], tmp_path: Path) -> None:
    model = damaged(tokenizer_config={"eos_token": None}, config={"eos_token_id": None})
    (model / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"no end-of-sequence token is known .*--eod_token"):
        generate_text(TextRequest(model, num_documents=1), tmp_path / "a.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_models_own_code_is_not_run(damaged: Callable[..., Path], tmp_path: Path) -> None:
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    model = damaged(config={"auto_map": names, "_attn_implementation": "nobody/kernel"})
    (model / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    generate_text(TextRequest(model, num_documents=1, **SIZES), tmp_path / "a.jsonl")
    assert not (tmp_path / "ran").exists()


REFUSED: dict[str, tuple[dict, str]] = {
    "no amount": ({"num_documents": None}, "either --num_documents or --num_tokens"),
    "two amounts": ({"num_tokens": 5}, "either --num_documents or --num_tokens"),
    "no documents": ({"num_documents": 0}, "--num_documents is 0: it must be at least 1"),
    "no batch": ({"batch_size": 0}, "--batch_size is 0"),
    "no length": ({"max_document_tokens": -1}, "--max_document_tokens is -1"),
    "frozen": ({"temperature": 0.0}, "--temperature is 0: it must be above 0 and at most 2"),
    "too hot": ({"temperature": 2.5}, "--temperature is 2.5"),
    "no probability": ({"top_p": 0.0}, "--top_p is 0: it must be above 0 and at most 1"),
    "too much probability": ({"top_p": 1.5}, "--top_p is 1.5"),
    "a negative seed": ({"seed": -1}, "--seed is -1: it cannot be negative"),
    "an unknown token": ({"eod_token": "<end>"}, "has no token '<end>'"),
    "no prompts": ({"prompts": Path("nowhere")}, "nowhere does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_request_is_refused(name: str, request_: TextRequest, tmp_path: Path) -> None:
    fields, message = REFUSED[name]
    with pytest.raises((ConfigError, DataError), match=message):
        generate_text(replace(request_, **fields), tmp_path / "text.jsonl")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "abc"}', "none of its 1 texts has 8 tokens: give longer texts, or a smaller --prompt_tokens"),
        ('{"text": 5}', "line 1: 'text' holds a number, not text"),
        ('{"content": "x"}', "line 1: no field 'text'"),
    ],
)
def test_unusable_prompts_are_refused(line: str, message: str, request_: TextRequest, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(f"{line}\n")
    steered = replace(request_, prompts=tmp_path / "p.jsonl", prompt_tokens=8)
    with pytest.raises(DataError, match=message):
        generate_text(steered, tmp_path / "text.jsonl")
    with pytest.raises(ConfigError, match="--prompt_tokens is 20: it must be below --max_document_tokens, 20"):
        generate_text(replace(steered, prompt_tokens=20), tmp_path / "text.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_an_existing_output_is_replaced_only_if_asked(request_: TextRequest, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "text.jsonl"
    output.write_text("mine\n")
    for resume in (False, True):
        with pytest.raises(DataError, match="exists: choose another --output, or give --overwrite"):
            generate_text(request_, output, resume=resume)
    with pytest.raises(KeyboardInterrupt):
        generate_text(request_, output, overwrite=True, progress=interrupt_after(9))
    assert output.read_text() == "mine\n"
    generate_text(request_, output, overwrite=True)
    assert output.read_bytes() == expected
    with pytest.raises(DataError, match="is a folder"):
        generate_text(request_, tmp_path)


def test_a_draft_with_other_settings_is_not_resumed(request_: TextRequest, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "text.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_text(request_, output, progress=interrupt_after(9))
    with pytest.raises(DataError, match="was started with seed 0, not 1: give the same options, or leave out --resume"):
        generate_text(replace(request_, seed=1), output, resume=True)
    assert generate_text(request_, output, resume=True).resumed.num_documents == 8
    assert output.read_bytes() == expected


def test_only_one_process_writes_an_output(request_: TextRequest, tmp_path: Path) -> None:
    output = tmp_path / "text.jsonl"
    with locked(draft_of(output), output), pytest.raises(CheckpointError, match="another process is writing"):
        generate_text(request_, output)
