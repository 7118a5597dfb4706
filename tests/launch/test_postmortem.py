"""Who died first, from what torchrun 2.13 writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_llamapro.launch.postmortem import describe

BLOCK = """\
[{number}]:
  time      : 2026-11-25_16:05:{second}
  host      : {host}.cluster.local
  rank      : {rank} (local_rank: {local})
  exitcode  : {code} (pid: 233)  ({name})
  error_file: <N/A>
  traceback : Signal received by PID 233
"""


def block(rank: int, code: int, *, host: str = "n1", second: int = 10) -> str:
    return BLOCK.format(number=0, second=second, host=host, rank=rank, local=rank % 2, code=code, name="")


def test_a_kill_comes_before_what_it_caused() -> None:
    lost_its_peer = block(0, 1, second=10)
    killed = block(3, -9, host="n2", second=12)
    line, code = describe([lost_its_peer, killed])
    assert (line, code) == (
        "rank 3 on n2 died first, at 2026-11-25 16:05:12: killed by SIGKILL (out of memory? see the node's kernel log)",
        0,
    )


def test_what_torchrun_ended_died_of_something_else() -> None:
    line, _ = describe([block(1, -15, second=10) + block(0, 1, second=11) + "[default0]:error: the disk is full\n"])
    assert line == "rank 0 on n1 died first, at 2026-11-25 16:05:11: exit code 1: the disk is full"


def test_what_lost_another_comes_after_it() -> None:
    """Their ends are in the same second, and a rank whose NCCL aborts is killed by a signal."""
    gloo = (
        "RuntimeError: [/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.1]:46006"
    )
    nccl = "[rank3]:[E1126 ProcessGroupNCCL.cpp:2057] Rank 3 watchdog: NCCL error: remote process exited or there was …"
    line, _ = describe(
        [
            block(0, 1) + f"[default0]:[rank0]: {gloo}\n",
            block(3, -6, host="n3") + f"[default1]:{nccl}\n",
            block(2, 1, host="n2") + "[default0]:[rank2]: ValueError: no such domain\n[default0]:[rank2]: \n",
        ]
    )
    assert line == "rank 2 on n2 died first, at 2026-11-25 16:05:10: exit code 1: ValueError: no such domain"


def test_where_torchrun_started_it_again_the_last_words_count() -> None:
    lost = "[default0]:[rank0]: RuntimeError: Connection closed by peer\n"
    line, _ = describe([block(1, 1), lost + "[default0]:[rank0]: KeyError: 'x'\n" + block(0, 1)])
    assert line.endswith("rank 0 on n1 died first, at 2026-11-25 16:05:10: exit code 1: KeyError: 'x'")


def test_a_hang_is_told_with_its_rank() -> None:
    line, _ = describe([block(0, 70) + "[default0]:hang: the others wait for rank 1: rank 1 is in read (data.py)\n"])
    assert "exit code 70: hang: the others wait for rank 1" in line


def test_a_hang_comes_before_what_its_end_aborts() -> None:
    line, _ = describe([block(3, -6, second=9), block(0, 70) + "[default0]:hang: rank 1 gave no sign of life\n"])
    assert line == "rank 0 on n1 died first, at 2026-11-25 16:05:10: exit code 70: hang: rank 1 gave no sign of life"


def test_a_refused_input_is_an_end() -> None:
    line, code = describe([block(0, 2) + "[default0]:error: data.seq_length is 4096, but …\n"])
    assert (line, code) == ("the run was refused: data.seq_length is 4096, but …", 2)


def test_nothing_was_said(tmp_path: Path) -> None:
    (tmp_path / "n1.log").write_bytes(b"\xff no report")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_llamapro.launch.postmortem", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("no node says that a rank died"), done.stderr
