"""The end of torchrun's own report: real torchrun, with ranks that end in every possible way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# How a rank ends, and the end of torchrun's report.
PROGRAM = """
import os, sys
from megatron_llamapro.config.command import end_at_once, run_command
from megatron_llamapro.config.errors import ConfigError, RunError

def main():
    rank = int(os.environ["RANK"])
    if rank == int(sys.argv[2]):
        if sys.argv[1] == "at once":
            end_at_once(75, "error: nobody came")
        raise {"refused": ConfigError("bad"), "failed": RunError("full"), "bug": ValueError("odd")}[sys.argv[1]]
    import signal
    signal.pause()

run_command(main)
"""
ENDS = {
    "refused": (2, "  traceback : error: bad"),
    "failed": (75, "  traceback : error: full"),
    "at once": (75, "  traceback : error: nobody came"),
    "bug": (1, "  ValueError: odd"),
}


@pytest.mark.parametrize(
    ("how", "rank", "world_size"), [("refused", 0, 1), ("failed", 1, 2), ("bug", 1, 2), ("at once", 3, 4)]
)
def test_the_report_ends_with_the_cause(how: str, rank: int, world_size: int, tmp_path: Path) -> None:
    code, last = ENDS[how]
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), how, str(rank)], capture_output=True, text=True, timeout=200
    )
    *report, border = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and set(border) == {"="}
    assert report[-1] == last, done.stderr
    assert f"  exitcode  : {code} " in "\n".join(report[-12:])
    root = report[-1 - report[::-1].index("Root Cause (first observed failure):") :]
    assert f"  rank      : {rank} (local_rank: {rank})" in root
    if how == "bug":  # its own traceback, and again in the report
        assert done.stderr.count("ValueError: odd") == 2 and done.stderr.count('raise {"refused"') == 2
