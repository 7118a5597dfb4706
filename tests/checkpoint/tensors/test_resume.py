"""An interrupted conversion resumes after the work that is safely on disk, and never uses another conversion's
leftovers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from megatron_llamapro.checkpoint.convert import (
    JOURNAL,
    TORCH_DIST,
    Options,
    TargetKind,
    expand_hf,
    hf_to_megatron,
    legacy,
)
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.checkpoint.tensors.layout import StoredTensor
from megatron_llamapro.checkpoint.tensors.transfer import Journal, TargetFiles
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion

Tiny = Callable[..., Path]

# One or two tensors per batch; otherwise a tiny model would be a single batch.
CONVERT = """
import sys, time
from pathlib import Path
from megatron_llamapro.checkpoint import convert
from megatron_llamapro.checkpoint.tensors import transfer
from megatron_llamapro.expansion.round import Expansion
transfer.BATCH_BYTES = 20_000
kind, source, target, workers = sys.argv[1:5]
function = {"hf": convert.expand_hf, "megatron": convert.hf_to_megatron}[kind]
options = convert.Options(resume=True, num_workers=int(workers))
print("ready", flush=True)
done = function(Path(source), Path(target), expansion=Expansion.at(2, 5), options=options)
print(done.num_resumed_bytes)
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "convert.py"
    path.write_text(CONVERT)
    return path


def test_a_conversion_killed_at_fifty_moments_completes(tiny_llama: Tiny, server: Path, tmp_path: Path) -> None:
    """Send SIGKILL at random moments, again and again into the same target. The target is absent or complete, and
    finished work is not repeated."""
    source, dice = tiny_llama(), random.Random(0)
    expected = {}
    for kind, function in (("hf", expand_hf), ("megatron", hf_to_megatron)):
        function(source, tmp_path / f"expected-{kind}", expansion=Expansion.at(2, 5))
        expected[kind] = contents(tmp_path / f"expected-{kind}")
    killed = finished = resumed = 0
    for _ in range(50):
        kind = dice.choice(["hf", "megatron"])
        target = tmp_path / kind
        command = [sys.executable, str(server), kind, str(source), str(target), str(dice.choice([1, 2]))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(dice.random() * 0.06)
        process.kill()
        output = process.communicate()[0]
        if target.exists():
            assert contents(target) == expected[kind]
            finished += 1
            shutil.rmtree(target)
        killed += process.returncode == -signal.SIGKILL
        resumed += output.strip() not in ("", "0")
    assert killed > 10
    for kind in ("hf", "megatron"):
        subprocess.run([sys.executable, str(server), kind, str(source), str(tmp_path / kind), "2"], check=True)
        assert contents(tmp_path / kind) == expected[kind]


def convert_and_interrupt(function: Callable, source: Path, target: Path, after_bytes: int, **settings: object) -> None:
    """Interrupt a conversion (Ctrl-C) once `after_bytes` are written."""
    written = 0

    def progress(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if written > after_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function(source, target, options=Options(num_workers=1, progress=progress), **settings)
    assert not target.exists()


@pytest.mark.parametrize("function", [expand_hf, hf_to_megatron])
def test_finished_work_is_not_repeated(
    function: Callable, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    expansion = {"expansion": Expansion.at(2, 5)}
    convert_and_interrupt(function, tiny_llama(), tmp_path / "it", 300_000, **expansion)
    journal = tmp_path / ".it.partial" / JOURNAL
    names = [name for line in journal.read_text().splitlines()[1:] for name in json.loads(line)["hashes"]]
    assert len(names) > 5
    written: list[int] = []
    put = TargetFiles.put

    def counted(self: TargetFiles, tensor: StoredTensor, start: int, rows: numpy.ndarray, itemsize: int) -> None:
        written.append(rows.nbytes)
        put(self, tensor, start, rows, itemsize)

    monkeypatch.setattr(TargetFiles, "put", counted)
    seen: list[int] = []
    done = function(tiny_llama(), tmp_path / "it", options=Options(resume=True, progress=seen.append), **expansion)
    assert 200_000 < done.num_resumed_bytes < 320_000
    assert sum(seen) == done.num_bytes
    assert sum(written) <= done.num_bytes - done.num_resumed_bytes
    function(tiny_llama(), tmp_path / "fresh", **expansion)
    assert contents(tmp_path / "it") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("function", [expand_hf, hf_to_megatron])
def test_work_lost_in_a_power_cut_is_repeated(
    function: Callable, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal names tensors that read as zeros from the disk."""
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    expansion = {"expansion": Expansion.at(2, 5)}
    convert_and_interrupt(function, tiny_llama(), tmp_path / "it", 300_000, **expansion)
    largest = max((tmp_path / ".it.partial").iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(100_000))
    done = function(tiny_llama(), tmp_path / "it", options=Options(resume=True), **expansion)
    assert 50_000 < done.num_resumed_bytes < 250_000
    function(tiny_llama(), tmp_path / "fresh", **expansion)
    assert contents(tmp_path / "it") == contents(tmp_path / "fresh")


def test_without_resume_it_starts_over(tiny_llama: Tiny, tmp_path: Path) -> None:
    convert_and_interrupt(hf_to_megatron, tiny_llama(), tmp_path / "it", 200_000)
    done = hf_to_megatron(tiny_llama(), tmp_path / "it")
    assert done.num_resumed_bytes == 0


OTHERS = {
    "another plan": {"expansion": Expansion.at(0)},
    "another type": {"dtype": "bfloat16"},
    "another source": {"seed_of_source": 1},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS.keys())
def test_another_conversions_leftovers_are_not_resumed(
    settings: dict, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    convert_and_interrupt(hf_to_megatron, tiny_llama(), tmp_path / "it", 300_000)
    settings = dict(settings)
    source = tiny_llama(seed=settings.pop("seed_of_source", 0))
    done = hf_to_megatron(source, tmp_path / "it", options=Options(resume=True), **settings)
    assert done.num_resumed_bytes == 0
    hf_to_megatron(source, tmp_path / "fresh", **settings)
    assert contents(tmp_path / "it") == contents(tmp_path / "fresh")


def test_a_changed_source_is_not_resumed(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    convert_and_interrupt(hf_to_megatron, source, tmp_path / "it", 300_000)
    os.utime(source / "model.safetensors", (1, 1))
    assert hf_to_megatron(source, tmp_path / "it", options=Options(resume=True)).num_resumed_bytes == 0


@pytest.mark.parametrize("kind", [TORCH_DIST, legacy(tensor_model_parallel_size=2)], ids=["torch_dist", "legacy"])
def test_files_removed_from_the_source_are_not_in_the_target(
    kind: TargetKind, damaged: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    source = damaged()
    (source / "LICENSE.txt").write_text("of another model")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("template")
    convert_and_interrupt(hf_to_megatron, source, tmp_path / "it", 300_000, kind=kind)
    assert (tmp_path / ".it.partial" / "LICENSE.txt").exists()
    (source / "LICENSE.txt").unlink()
    shutil.rmtree(source / "additional_chat_templates")
    assert hf_to_megatron(source, tmp_path / "it", kind=kind, options=Options(resume=True)).num_resumed_bytes > 0
    hf_to_megatron(source, tmp_path / "fresh", kind=kind)
    assert contents(tmp_path / "it") == contents(tmp_path / "fresh")
    assert not any(path.is_dir() for path in (tmp_path / "it").iterdir() if path.name != "release")


def test_a_journal_with_a_cut_last_line_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "plan")
    journal.note({"a": "1"})
    journal.note({"b": "2"})
    with (tmp_path / "j").open("a") as file:
        file.write('{"hashes": {"c"')
    again = Journal(tmp_path / "j", "plan")
    assert again.hashes == {"a": "1", "b": "2"}
    again.note({"c": "3"})
    assert Journal(tmp_path / "j", "plan").hashes == {"a": "1", "b": "2", "c": "3"}
    assert Journal(tmp_path / "j", "another plan").is_new


DAMAGED = {
    "zeros in the place of a block": b"\0" * 4096 + b"\n",
    "no text": b"\xff\xfe\n",
    "a number": b"5\n",
    "a list": b"[]\n",
    "no hashes": b'{"plan": "plan"}\n',
    "hashes that are none": b'{"hashes": ["a"]}\n',
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_journal_damaged_in_the_middle_counts_up_to_there(damage: bytes, tmp_path: Path) -> None:
    """The lines before the damage count."""
    Journal(tmp_path / "j", "plan").note({"a": "1"})
    with (tmp_path / "j").open("ab") as file:
        file.write(damage + b'{"hashes": {"b": "2"}}\n')
    assert Journal(tmp_path / "j", "plan").hashes == {"a": "1"}
    (tmp_path / "j").write_bytes(damage)
    assert Journal(tmp_path / "j", "plan").is_new


def test_a_batch_that_is_already_written_adds_nothing_to_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "plan")
    journal.note({"a": "1"})
    before = (tmp_path / "j").read_bytes()
    journal.note({})
    assert (tmp_path / "j").read_bytes() == before


def test_an_interrupt_during_the_final_sync_repeats_nothing(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is written at that point; syncing a large checkpoint takes minutes."""

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_llamapro.config.drafts.sync_tree", interrupt)
        hf_to_megatron(tiny_llama(), tmp_path / "it")
    done = hf_to_megatron(tiny_llama(), tmp_path / "it", options=Options(resume=True))
    assert done.num_resumed_bytes == done.num_bytes
    hf_to_megatron(tiny_llama(), tmp_path / "fresh")
    assert contents(tmp_path / "it") == contents(tmp_path / "fresh")


def test_another_division_of_the_same_sizes_is_not_resumed(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of 1, 2, 2, 1 and of 2, 1, 1, 2 layers over two ranks: every file has the same name and size."""
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    ranks = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    source, expansion = tiny_llama(), {"expansion": Expansion.at(2, 5)}
    first = legacy(**ranks, pipeline_stage_layers=(1, 2, 2, 1))
    convert_and_interrupt(hf_to_megatron, source, tmp_path / "it", 500_000, kind=first, **expansion)
    second = legacy(**ranks, pipeline_stage_layers=(2, 1, 1, 2))
    done = hf_to_megatron(source, tmp_path / "it", kind=second, options=Options(resume=True), **expansion)
    assert done.num_resumed_bytes == 0
    assert all(check.ok for check in verify(source, tmp_path / "it", quick=True))


def test_a_configuration_corrected_meanwhile_is_not_resumed(
    damaged: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes are equal, but rows of queries, keys and values lie elsewhere."""
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    source = damaged(config={"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8})
    convert_and_interrupt(hf_to_megatron, source, tmp_path / "it", 300_000)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (source / "config.json").write_text(json.dumps(config))
    assert hf_to_megatron(source, tmp_path / "it", options=Options(resume=True)).num_resumed_bytes == 0


def test_a_draft_that_lost_a_file_is_not_resumed(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    convert_and_interrupt(hf_to_megatron, tiny_llama(), tmp_path / "it", 300_000)
    (tmp_path / ".it.partial" / "__0_0.distcp").unlink()
    assert hf_to_megatron(tiny_llama(), tmp_path / "it", options=Options(resume=True)).num_resumed_bytes == 0
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "it", quick=True))


def test_a_mistake_when_resuming_loses_nothing(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.transfer.BATCH_BYTES", 20_000)
    convert_and_interrupt(hf_to_megatron, tiny_llama(), tmp_path / "it", 300_000)
    resume = Options(resume=True)
    with pytest.raises(CheckpointError, match="cannot be divided"):
        hf_to_megatron(tiny_llama(), tmp_path / "it", kind=legacy(tensor_model_parallel_size=3), options=resume)
    usage = shutil.disk_usage(tmp_path)._replace(free=9)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_llamapro.checkpoint.writing.shutil.disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match="make room"):
            hf_to_megatron(tiny_llama(), tmp_path / "it", options=resume)
    assert hf_to_megatron(tiny_llama(), tmp_path / "it", options=resume).num_resumed_bytes > 200_000
