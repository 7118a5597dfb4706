"""Finds the rank that died first, from the logs of torchrun 2.13."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.config.command import DIVERGED, TRY_AGAIN, USAGE_ERROR
from megatron_llamapro.launch.postmortem import describe

BLOCK = """\
[{rank}]:
  time      : 2026-11-25_16:05:{second}
  host      : localhost
  rank      : {rank} (local_rank: {local})
  exitcode  : {code} (pid: {pid})  (…)
  error_file: <N/A>
  traceback : Signal received by PID {pid}
"""
CLOSED = "W1125 16:05:09.1 100 torch/…/multiprocessing/api.py:1029] Sending process {pid} closing signal SIGTERM\n"
LOST_BY_GLOO = "RuntimeError: [/…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.1]:46006"
LOST_BY_NCCL = "[E1125 ProcessGroupNCCL.cpp:2057] Rank 3 watchdog: NCCL error: remote process exited or there was …"
LOST_BY_STORE = "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server …"


def block(rank: int, code: int, *, second: int = 10) -> str:
    """Return torchrun's report of a rank, for nodes of two ranks."""
    return BLOCK.format(second=second, rank=rank, local=rank % 2, code=code, pid=200 + rank)


def says(rank: int, text: str) -> str:
    return f"[default{rank % 2}]:[rank{rank}]: {text}\n"


def test_a_kill_precedes_the_errors_it_caused() -> None:
    line, code = describe({"n1": block(0, 1, second=10), "n2": block(3, -9, second=12)})
    assert (line, code) == (
        "rank 3 on n2 died first, at 2026-11-25 16:05:12: killed by SIGKILL (out of memory? see the node's kernel log)",
        0,
    )


@pytest.mark.parametrize("code", [-15, -9, 0, 143])
def test_a_rank_ended_by_torchrun_is_not_the_first(code: int) -> None:
    """torchrun sends SIGKILL 30 seconds later, because ranks that wait for a dead one ignore SIGTERM."""
    log = (
        CLOSED.format(pid=201)
        + block(1, code, second=40)
        + block(0, 1, second=10)
        + "[default0]:error: the disk is full\n"
    )
    assert describe({"n1": log})[0] == (
        "rank 0 on n1 died first, at 2026-11-25 16:05:10: exit code 1: the disk is full"
    )


def test_a_neighbour_that_ends_sooner_is_not_the_first() -> None:
    """Python takes a while to end after an error, so a rank that lost its connection may end first."""
    log = says(1, "ZeroDivisionError: division by zero") + says(0, LOST_BY_GLOO) + CLOSED.format(pid=201)
    line, code = describe({"n1": log + block(0, 1) + block(1, 1)})
    assert line == "rank 1 on n1 died first, at 2026-11-25 16:05:10: exit code 1: ZeroDivisionError: division by zero"
    assert code == 0


@pytest.mark.parametrize("lost", [LOST_BY_GLOO, LOST_BY_STORE])
def test_a_lost_connection_is_a_consequence(lost: str) -> None:
    """Both ranks end in the same second or even in reverse order. A rank whose NCCL aborts is killed by a signal."""
    logs = {
        "n1": block(0, 1, second=9) + says(0, lost),
        "n2": block(2, 1) + says(2, "ValueError: no such domain") + says(2, ""),
        "n3": block(5, -6) + says(5, LOST_BY_NCCL),
    }
    line, _ = describe(logs)
    assert line == "rank 2 on n2 died first, at 2026-11-25 16:05:10: exit code 1: ValueError: no such domain"


def test_after_a_restart_by_torchrun_the_last_words_count() -> None:
    n1 = says(0, LOST_BY_GLOO) + says(0, "KeyError: 'x'") + block(0, 1)
    assert describe({"n1": n1, "n2": block(2, 1)})[0].endswith("exit code 1: KeyError: 'x'")
    n1 = says(0, "ValueError: flaky") + says(0, LOST_BY_NCCL) + block(0, -6)
    line, _ = describe({"n1": n1, "n2": says(2, "KeyError: 'x'") + block(2, 1)})
    assert line.startswith("rank 2 on n2") and line.endswith("KeyError: 'x'")


def test_errors_of_a_python_shutdown_are_not_the_cause() -> None:
    log = says(0, "ValueError: no such domain") + says(0, "ImportError: sys.meta_path is None, Python is likely …")
    assert describe({"n1": log + block(0, 1)})[0].endswith("exit code 1: ValueError: no such domain")


def test_a_kill_is_never_a_consequence() -> None:
    """Even if a library logged trouble with its own connections."""
    n1 = says(0, "wandb: Connection reset by peer, entering retry loop") + block(0, -9, second=12)
    assert describe({"n1": n1, "n2": block(2, -6)})[0].startswith("rank 0 on n1 died first")


def test_an_error_of_all_ranks_is_reported_once() -> None:
    n1 = "[default0]:error: the disk is full\n" + block(0, TRY_AGAIN, second=11) + block(1, TRY_AGAIN, second=11)
    line, code = describe({"n1": n1, "n2": block(2, TRY_AGAIN, second=10)})
    assert line.startswith("rank 0 on n1") and line.endswith(": exit code 75: the disk is full") and code == 0


def test_a_signal_without_a_name_has_its_number() -> None:
    assert describe({"n1": block(0, -40)})[0].endswith("killed by signal 40")


def test_a_hang_names_its_rank() -> None:
    line, _ = describe({"n1": block(0, 70) + "[default0]:hang: the others wait for rank 1: it is in read (data.py)\n"})
    assert "exit code 70: hang: the others wait for rank 1" in line


def test_a_hang_precedes_the_aborts_it_causes() -> None:
    n1 = block(0, 70) + "[default0]:hang: rank 1 gave no sign of life\n"
    line, _ = describe({"n1": n1, "n2": block(3, -6, second=9)})
    assert line == "rank 0 on n1 died first, at 2026-11-25 16:05:10: exit code 70: hang: rank 1 gave no sign of life"


@pytest.mark.parametrize(("code", "says"), [(USAGE_ERROR, "the run was refused"), (DIVERGED, "the run diverged")])
def test_an_end_that_all_ranks_agree_on_is_final(code: int, says: str) -> None:
    earlier = "[default0]:error: the disk is full\n"
    n1 = earlier + "[default0]:error: data.seq_length is 4096, but …\n" + block(0, code)
    assert describe({"n1": n1, "n2": block(2, code)}) == (f"{says}: data.seq_length is 4096, but …", code)


@pytest.mark.parametrize("code", [USAGE_ERROR, DIVERGED, TRY_AGAIN])
def test_an_error_of_one_rank_is_not_the_inputs_fault(code: int) -> None:
    log = block(3, code) + "[default1]:error: data.bin: Input/output error\n"
    line, exit_code = describe({"n1": block(0, 1) + says(0, LOST_BY_GLOO), "n2": log})
    assert exit_code == 0
    assert line.endswith(
        f"rank 3 on n2 died first, at 2026-11-25 16:05:10: exit code {code}: data.bin: Input/output error"
    )


def test_logs_without_a_report_say_so(tmp_path: Path) -> None:
    (tmp_path / "n1.log").write_bytes(b"\xff no report")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_llamapro.launch.postmortem", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("no node reported a dead rank"), done.stderr
