"""A lock has one holder at a time, however the last one ended. Holders are real processes. One "on another machine"
reports another boot and pid namespace, so that its process cannot be looked up here."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import ConfigError, RunError
from megatron_llamapro.runtime.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from megatron_llamapro.runtime import lock
if sys.argv[2] == "elsewhere":
    lock._pids_of = lambda: "another boot/1"
with lock.RunLock(Path(sys.argv[1]), "checkpoint.save (runs/first)", beat_seconds=0.1, patience_seconds=1.0):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path, where: str = "here") -> subprocess.Popen:
    """Start a process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(path), where]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def lock(path: Path, **settings) -> RunLock:
    settings = {"beat_seconds": 0.1, "patience_seconds": 1.0, "say": lambda text: None, **settings}
    return RunLock(path, "checkpoint.save (runs/first)", **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "save").mkdir()
    return tmp_path / "save" / "run.lock"


def test_an_earlier_start_of_the_same_job_may_be_retried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM may give up a node that still runs and requeue the job; a later try may find the first start ended."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder = hold(path, "elsewhere")
    with pytest.raises(RunError, match=f"held by an earlier start of this job .process {holder.pid} on"), lock(path):
        pass
    holder.communicate()
    with lock(path):
        pass


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_second_holder_is_told_who_holds_the_lock(where: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder = hold(path, where)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(ConfigError) as refused, lock(path):
        pass
    assert str(refused.value).startswith(
        f"checkpoint.save (runs/first) is in use by another run (process {holder.pid} on "
    )
    assert "SLURM_JOB_ID=17, since 20" in str(refused.value) and "\n" not in str(refused.value)
    holder.communicate("")
    assert holder.returncode == 0 and not path.exists()
    with lock(path):
        assert list(path.parent.iterdir()) == [path]
    assert list(path.parent.iterdir()) == []


def test_a_killed_holder_on_this_machine_is_known_at_once(path: Path) -> None:
    holder = hold(path)
    holder.kill()  # not waited for, so its pid still exists
    time.sleep(0.2)
    with lock(path, patience_seconds=60.0):
        assert f'"pid": {os.getpid()}' in path.read_text()
    holder.communicate()


def test_a_killed_holder_elsewhere_is_known_by_its_missing_beats(path: Path) -> None:
    holder, said = hold(path, "elsewhere"), []
    holder.kill()
    holder.communicate()
    started = time.monotonic()
    with lock(path, say=said.append):
        assert time.monotonic() - started > 0.9
    assert said == [said[0]] and "waiting 1 s to see whether that run is alive" in said[0]


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 1}'])
def test_a_half_written_lock_does_not_block_for_long(text: str, path: Path) -> None:
    path.write_text(text)
    with lock(path):
        pass


def test_a_reused_pid_is_another_process(path: Path) -> None:
    """After a long time, or in a container, where every program is process 1."""
    holder = hold(path)
    text = path.read_text()
    holder.communicate("")
    path.write_text(text.replace(f'"pid": {holder.pid}', f'"pid": {os.getpid()}'))
    with lock(path, patience_seconds=60.0):
        pass


def test_a_holder_that_slept_too_long_ends_when_it_wakes_up(path: Path) -> None:
    holder = hold(path, "elsewhere")
    holder.send_signal(signal.SIGSTOP)
    with lock(path):
        holder.send_signal(signal.SIGCONT)
        time.sleep(1)  # its input stays open: it ends by itself
        _, said = holder.communicate(timeout=20)
        assert f'"pid": {os.getpid()}' in path.read_text()
    assert holder.returncode == 75
    assert said.startswith("error: checkpoint.save (runs/first) was taken over by process") and said.count("\n") == 1


def test_one_of_many_gets_a_dead_holders_lock(path: Path) -> None:
    """All try at the same time, again and again; two never hold it together."""
    inside, most, refused = [], [], []

    def race() -> None:
        try:
            with lock(path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.05)
                inside.pop()
        except ConfigError as error:
            refused.append(error)

    for _ in range(5):
        holder = hold(path)
        holder.kill()
        holder.communicate()
        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 20


def test_folders_made_for_the_lock_are_removed_with_it(tmp_path: Path) -> None:
    for content in (None, "kept"):
        with lock(tmp_path / "runs" / "first" / "run.lock"):
            if content:
                (tmp_path / "runs" / "first" / content).touch()
        assert (tmp_path / "runs").exists() is bool(content)


def test_an_interrupted_takeover_does_not_block_for_long(path: Path) -> None:
    holder = hold(path)
    holder.kill()
    holder.communicate()
    claim = path.with_name(f".run.lock.{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}")
    claim.write_text("")
    with lock(path):
        assert list(path.parent.iterdir()) == [path]


def test_a_lock_removed_by_hand_is_written_again(path: Path) -> None:
    with lock(path):
        path.unlink()
        time.sleep(0.5)
        with pytest.raises(ConfigError, match="in use"), lock(path):
            pass
