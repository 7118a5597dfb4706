"""However preprocessing ends, it says so in one line and leaves nothing behind: killed workers, a full disk,
signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest
import torch

from megatron_llamapro.config.errors import CheckpointError, RunError
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import paths_of
from megatron_llamapro.testing.distributed import run_apart


@pytest.fixture(scope="module")
def long_jsonl(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return enough text for tens of chunks."""
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_bytes(jsonl.read_bytes() * 60)
    return path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_killed_worker_is_named(
    number: signal.Signals, long_jsonl: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(num_bytes: int) -> None:
        if not killed:
            victim = active_children()[-1]
            killed.append(victim.pid or 0)
            os.kill(killed[0], number)

    with pytest.raises(RunError) as error:
        preprocess([long_jsonl], tmp_path / "new" / "out", tokenizer=tokenizer_folder, num_workers=2, progress=kill_one)
    message = str(error.value)
    how = "was killed (SIGKILL), as the system does when memory runs out" if number == 9 else "was killed by signal 6"
    assert f"of 2 (process {killed[0]}) {how}: nothing was written; try again" in message
    assert "smaller --num_workers" in message and "\n" not in message
    assert not active_children() and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(long_jsonl: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    message = run_apart(on_a_full_disk, long_jsonl, tokenizer_folder, tmp_path / "out")
    assert message.startswith(f"{tmp_path}/out was not written: ") and message.endswith("make room, then try again")
    assert list(tmp_path.iterdir()) == []


def on_a_full_disk(jsonl: Path, tokenizer: Path, prefix: Path) -> str:
    """Preprocess while no file may exceed 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(RunError) as error:
        preprocess([jsonl], prefix, tokenizer=tokenizer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error.value)


def killed_on_its_way(jsonl: Path, tokenizer: Path, prefix: Path) -> None:
    """Preprocess with two workers, note their process ids, and be killed."""

    def die(num_bytes: int) -> None:
        prefix.with_name("workers").write_text(json.dumps([child.pid for child in active_children()]))
        os.kill(os.getpid(), signal.SIGKILL)

    preprocess([jsonl], prefix, tokenizer=tokenizer, num_workers=2, progress=die)


def test_the_next_run_removes_a_killed_runs_files(long_jsonl: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The killed run's workers end by themselves."""
    prefix = tmp_path / "out"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_apart(killed_on_its_way, long_jsonl, tokenizer_folder, prefix)
    assert (tmp_path / ".out.tokens.partial" / "out.bin").exists()
    workers = json.loads((tmp_path / "workers").read_text())
    assert len(workers) == 2
    psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=60)
    assert not any(psutil.pid_exists(pid) for pid in workers)
    (tmp_path / "a.jsonl").write_text('{"text": "new"}\n')
    preprocess([tmp_path / "a.jsonl"], prefix, tokenizer=tokenizer_folder)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.jsonl", "workers", "out.bin", "out.idx", "out.json"}


def test_a_second_process_is_refused(jsonl: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """It gets the same prefix, and does not disturb the first."""
    messages: list[str] = []

    def again(num_bytes: int) -> None:
        if not messages:
            with pytest.raises(CheckpointError) as error:
                preprocess([jsonl], tmp_path / "out", tokenizer=tokenizer_folder)
            messages.append(str(error.value))

    preprocess([jsonl], tmp_path / "out", tokenizer=tokenizer_folder, progress=again)
    assert messages == [f"another process is writing {tmp_path}/out: wait for it, or choose another target"]
    assert all(path.exists() for path in paths_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_the_tool_and_its_workers(
    number: signal.Signals, code: int, word: str, long_jsonl: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Sent as a scheduler or a terminal sends it: to the tool and its workers."""
    command = [sys.executable, "tools/preprocess_data.py", "--tokenizer", str(tokenizer_folder), "--num_workers", "2"]
    command += ["--input", *[str(long_jsonl)] * 100, "--output_prefix", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    draft = tmp_path / ".out.tokens.partial" / "out.bin"
    while not (draft.exists() and draft.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (code, f"error: {word}\n")
    assert list(tmp_path.iterdir()) == []
