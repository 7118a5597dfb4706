"""The end of a job's life: its script runs for real, with stand-ins for SLURM's commands and for torchrun. tests/slurm
runs it on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from megatron_llamapro.config.command import DIVERGED
from megatron_llamapro.launch.config import read_launch_config
from megatron_llamapro.launch.slurm import sbatch_script

STAND_INS = {
    "srun": 'while [ "$1" != bash ] && [ "$1" != apptainer ]; do shift; done; echo $$ >shell.pid; exec "$@"',
    "apptainer": 'while [ "$1" != bash ]; do shift; done; IN_CONTAINER=1 exec "$@"',
    "scontrol": """case "$1 $2" in
"show hostnames") echo n1 ;;
"show job") echo "Id=7 JobState=${JOB_STATE:-RUNNING} Reason=${REASON:-None} Restarts=${RESTARTS:-0} BatchFlag=1" ;;
*) echo "scontrol $*" >>calls; exit "${SCONTROL_CODE:-0}" ;;
esac""",
    "scancel": 'echo "scancel $*" >>calls; [ "$1" != --signal=USR1 ] || kill -USR1 "$(cat shell.pid)"',
    "sleep": "exec /bin/sleep 0.3",
    "python3": f'[ "${{PYTHON_IS:-}}" = "${{IN_CONTAINER:-}}" ] && exec {sys.executable} "$@"',
}
FAILS = "exit 1"
REFUSED = """\
echo '[default0]:error: data.seq_length is 4096, but …'
echo '  time      : 2026-11-25_16:05:10'
echo '  host      : n1'
echo '  rank      : 0 (local_rank: 0)'
echo '  exitcode  : 2 (pid: 233)'
exit 1
"""


class Life(subprocess.CompletedProcess):
    """One life of a job; `calls` are its commands to SLURM."""

    calls: Sequence[str]


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., Life]:
    """Run one life of a job with this text as torchrun, and signal it once a file `started` exists. Signals to its
    steps reach only the node's shell, as on clusters that track processes by cgroups."""

    def live(
        torchrun: str, *, job: int = 7, launch: dict | None = None, sent: int = signal.SIGTERM, **environment: str
    ) -> Life:
        defaults = {"log_dir": "logs", "nodes": {"num_nodes": 2}}
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump({**defaults, **(launch or {})}))
        text = sbatch_script(read_launch_config(tmp_path / "launch.yaml"), ["--x"], save="save", train_iters=10)
        (tmp_path / "job.sbatch").write_text(text)
        for name, body in {**STAND_INS, "torchrun": torchrun}.items():
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        for name in ("calls", "started"):
            (tmp_path / name).unlink(missing_ok=True)
        variables = {
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NAME": "llamapro",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
            **environment,
        }
        (tmp_path / "logs").mkdir(exist_ok=True)
        with (tmp_path / "logs" / f"llamapro-{job}.out").open("w+") as output:
            process = subprocess.Popen(
                ["bash", "job.sbatch"],
                cwd=tmp_path,
                env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None and not (tmp_path / "started").exists():
                time.sleep(0.05)
            process.send_signal(sent)  # no effect if it has already ended
            process.wait(timeout=60)
            output.seek(0)
            life = Life(process.args, process.returncode, output.read())
        life.calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return life

    return live


def test_another_jobs_progress_is_not_counted(live: Callable[..., Life]) -> None:
    launch = {"slurm": {"max_lives_without_progress": 2}}
    assert live(FAILS, launch=launch).calls == ["scontrol requeue 7"]
    gave_up = live(FAILS, launch=launch)
    assert gave_up.calls == [] and "giving up: 2 lives in a row saved nothing new" in gave_up.stdout
    assert live(FAILS, launch=launch, job=8).calls == ["scontrol requeue 8"]


def test_setup_lines_may_use_unset_variables(live: Callable[..., Life]) -> None:
    """Environment modules and conda read unset variables, which `set -u` would make errors."""
    life = live(FAILS, launch={"setup": ['echo "${NOT_SET_ANYWHERE}"', "PATH=$PATH:/x", "set -eu"]})
    assert life.calls == ["scontrol requeue 7"], life.stdout
    assert "no node reported a dead rank" in life.stdout


ENDS = {  # a job that gets SIGTERM: SLURM's answer about it, and the job's own line
    "cancelled": ({"JOB_STATE": "COMPLETING"}, "was cancelled: it is not requeued"),
    "its node lost": ({"JOB_STATE": "COMPLETING", "RESTARTS": "1"}, "requeued by SLURM"),
    "out of time": ({"JOB_STATE": "COMPLETING", "REASON": "TimeLimit"}, "requeued"),
    "preempted after a grace": ({}, "requeued"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_cause_of_the_end_decides_about_requeueing(end: str, live: Callable[..., Life]) -> None:
    """scancel ends the ranks with the signal that also announces a preemption, but the job is then already ending."""
    slurm_says, says = ENDS[end]
    life = live("touch started; /bin/sleep 1", **slurm_says)
    assert f": {says}\n" in life.stdout, life.stdout
    calls = [call for call in life.calls if call != "scancel --signal=USR1 7"]
    assert calls == (["scontrol requeue 7"] if says == "requeued" else [])


def test_a_job_cancelled_during_the_postmortem_is_not_requeued(live: Callable[..., Life]) -> None:
    slow = ['[ -z "${LIFE_LOGS:-}" ] && touch started && /bin/sleep 1']  # if set, the ranks are about to start
    life = live(FAILS, launch={"setup": slow}, JOB_STATE="COMPLETING")
    assert ": was cancelled: it is not requeued\n" in life.stdout and life.calls == [], life.stdout


RANK = """\
import pathlib, signal, time
signal.signal(signal.SIGUSR1, lambda *_: exit("the rank heard"))
pathlib.Path("started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("setup", [":", "set -euo pipefail"])
def test_a_warning_signal_reaches_the_ranks(setup: str, live: Callable[..., Life]) -> None:
    """It passes through the node's shell after any setup lines. torchrun does not get it, because it would die."""
    ends = f"{sys.executable} -c '{RANK}'; echo torchrun ends"
    life = live(ends, launch={"setup": [setup]}, sent=signal.SIGUSR1)
    assert "told to stop" in life.stdout and "the rank heard\ntorchrun ends\n" in life.stdout, life.stdout
    assert "ended with code 0" in life.stdout and "scontrol requeue 7" in life.calls


@pytest.mark.parametrize("container", [{}, {"container_image": "image.sif", "container_runtime": "apptainer"}])
def test_a_refused_run_is_not_requeued(container: dict, live: Callable[..., Life]) -> None:
    """Only the container may have the package, so the job runs the check inside it."""
    life = live(REFUSED, launch=container, PYTHON_IS="1" if container else "")
    assert life.calls == [] and life.returncode == 1
    assert "the run was refused: data.seq_length is 4096" in life.stdout, life.stdout


def test_a_diverged_run_is_requeued_only_from_a_newer_checkpoint(live: Callable[..., Life]) -> None:
    """The machine may be the cause. From the same checkpoint the same steps diverge again."""
    diverged = REFUSED.replace("exitcode  : 2", f"exitcode  : {DIVERGED}")
    assert live("mkdir -p save; echo 5 >save/latest_checkpointed_iteration.txt\n" + diverged).calls == [
        "scontrol requeue 7"
    ]
    life = live(diverged)
    assert life.calls == [] and life.returncode == 1
    assert "the run diverged: data.seq_length" in life.stdout and "giving up: the same steps would" in life.stdout


def test_a_node_that_does_not_see_the_folders_is_named(live: Callable[..., Life]) -> None:
    life = live("exit 0", launch={"setup": ['rm -rf "$LIFE_LOGS"']})
    assert life.calls == [] and life.returncode == 1
    assert "does not see logs/7-1" in life.stdout
    assert "giving up: log_dir, checkpoint and data must be in folders that all nodes see" in life.stdout


def test_a_failure_after_progress_is_requeued(live: Callable[..., Life]) -> None:
    """torchrun's second start may be refused although the first one made progress."""
    saved = "mkdir -p save; echo 5 >save/latest_checkpointed_iteration.txt\n"
    assert live(saved + REFUSED).calls == ["scontrol requeue 7"]
    assert live(REFUSED).calls == []


def test_an_array_ends_when_a_job_gives_up(live: Callable[..., Life]) -> None:
    array = {"launch": {"slurm": {"max_lives": 9, "max_lives_without_progress": 2}}, "SLURM_ARRAY_JOB_ID": "7"}
    assert live(REFUSED, **array, SLURM_ARRAY_TASK_ID="1").calls == ["scancel --state=PENDING 7"]
    assert live(FAILS, **array, job=8, SLURM_ARRAY_TASK_ID="2").calls == []
    assert live(FAILS, **array, job=9, SLURM_ARRAY_TASK_ID="3").calls == ["scancel --state=PENDING 7"]


def test_a_cluster_that_does_not_requeue_gets_advice(live: Callable[..., Life]) -> None:
    life = live(FAILS, SCONTROL_CODE="1")
    assert life.returncode == 1 and "set slurm.max_lives to submit a job array" in life.stdout


def test_the_rendezvous_port_ignores_the_environment(live: Callable[..., Life]) -> None:
    assert "--rdzv-endpoint n1:20007 " in live('echo "$@"; exit 1', PORT="8080").stdout
    assert (
        "--rdzv-endpoint n1:3000 "
        in live('echo "$@"; exit 1', launch={"nodes": {"num_nodes": 2}, "rendezvous_port": 3000}).stdout
    )
