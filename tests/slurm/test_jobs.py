"""The shipped two-node job on a real scheduler trains to the end through every failure. Every step has the undisturbed
run's loss, to the last bit."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from cluster import Cluster

from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.launch.config import read_launch_config
from megatron_llamapro.launch.slurm import sbatch_script
from megatron_llamapro.testing.distributed import run_distributed

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
STEPS, SAVE_INTERVAL = 40, 5
_NUMBERS = itertools.count()


class Job:
    """A submitted job and its results."""

    def __init__(self, cluster: Cluster, inputs: Path, *, launch: dict, run: list[str]) -> None:
        self.cluster, self.folder = cluster, cluster.state / f"job{next(_NUMBERS)}"
        self.folder.mkdir()
        self.save = self.folder / "save"
        shipped = yaml.safe_load((ROOT / "examples" / "slurm" / "two_nodes.yaml").read_text())
        here = {
            **shipped,
            "log_dir": str(self.folder / "logs"),
            "working_dir": str(ROOT),
            "nodes": {"num_nodes": 2, "processes_per_node": 1, "gpus_per_node": None},
            "environment": {},
            **launch,
        }
        (self.folder / "launch.yaml").write_text(yaml.safe_dump(here))
        arguments = [*run_arguments(inputs, self.save), *run]
        config = parse_run_config(arguments)
        script = sbatch_script(
            read_launch_config(self.folder / "launch.yaml"),
            arguments,
            save=str(self.save),
            train_iters=config.training.train_iters,
        )
        (self.folder / "job.sbatch").write_text(script)
        (self.folder / "logs").mkdir()
        self.number = int(cluster.run("sbatch", "--parsable", str(self.folder / "job.sbatch")))

    def records(self) -> list[dict]:
        path = self.save / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]

    def losses(self) -> dict[int, tuple[float, float]]:
        """Return the last losses of every step, because a life may repeat steps that no earlier one saved."""
        return {record["iteration"]: (record["loss"], record["grad_norm"]) for record in self.records()}

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait(lambda: step in self.losses(), seconds=120, every=0.05)

    def wait_for_restart(self) -> None:
        """Wait for the next life. SLURM delays a requeued job by two minutes, so that nothing of its last life is left;
        here a few seconds suffice."""
        self.cluster.wait(lambda: self._is_again("PENDING"), seconds=120)
        time.sleep(4)
        self.cluster.start_now(self.number)
        self.cluster.wait(lambda: self._is_again("RUNNING"), seconds=60)

    def _is_again(self, state: str) -> bool:
        job = self.cluster.job(self.number)
        return job["JobState"] == state and job["Restarts"] != "0"

    def wait_for_end(self) -> str:
        ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
        self.cluster.wait(lambda: self.cluster.job(self.number)["JobState"] in ended, seconds=180)
        return self.cluster.job(self.number)["JobState"]

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.folder / "logs").glob("*.out"))


def run_arguments(inputs: Path, save: Path) -> list[str]:
    return [
        f"--model.checkpoint={inputs / 'model'}",
        f"--data.train=[{{prefix: {inputs / 'text'}}}]",
        "--data.seq_length=64",
        f"--training.train_iters={STEPS}",
        "--training.micro_batch_size=1",
        "--training.global_batch_size=48",  # a fifth of a second per step, so that there is time to disturb it
        "--training.precision=fp32",
        "--optimizer.lr=1e-3",
        f"--checkpoint.save={save}",
        f"--checkpoint.save_interval={SAVE_INTERVAL}",
    ]


@pytest.fixture
def submit(cluster: Cluster, inputs: Path) -> Iterator[Callable[..., Job]]:
    """Submit jobs of one test and cancel them after it, because the next test needs the nodes."""

    def submit(*run: str, **launch: object) -> Job:
        return Job(cluster, inputs, launch=launch, run=list(run))

    yield submit
    cluster.run("scancel", "--user=root")
    cluster.wait_until_idle()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, inputs: Path) -> Job:
    job = Job(cluster, inputs, launch={}, run=[])
    assert job.wait_for_end() == "COMPLETED", job.log()
    return job


def same_as(job: Job, undisturbed: Job) -> bool:
    return len(job.losses()) == STEPS and job.losses() == undisturbed.losses()


def test_two_nodes_train_as_one_process_does(undisturbed: Job, inputs: Path, tmp_path: Path) -> None:
    """Losses agree within 1e-5: two replicas sum in another order. In the log, every rank has a file of its own."""
    [alone] = run_distributed(train_alone, 1, run_arguments(inputs, tmp_path / "alone"))
    assert [loss for loss, _ in undisturbed.losses().values()] == pytest.approx(alone, rel=1e-5)
    logs = undisturbed.folder / "logs"
    assert {path.name for path in logs.glob("*-1/*.log")} == {"n1.log", "n2.log"}
    assert len([*logs.glob("*-1/n[12]/*/attempt_0/0/stdout.log")]) == 2
    assert "from step 0 of 40 on n[1-2]" in undisturbed.log()


def train_alone(arguments: list[str]) -> list[float]:
    from megatron_llamapro.runtime.stop import StopRequest
    from megatron_llamapro.training.loop import train
    from megatron_llamapro.training.setup import set_up

    class Losses(list):
        def write(self, record: dict) -> None:
            if record["kind"] == "train":
                self.append(record["loss"])

    torch.set_num_threads(1)
    losses = Losses()
    train(set_up(parse_run_config(arguments)), [losses], StopRequest())
    return [*losses]


@pytest.mark.parametrize("at_step", [0, 7], ids=["while importing", "in the middle"])
def test_a_preempted_job_saves_and_continues(at_step: int, submit: Callable[..., Job], undisturbed: Job) -> None:
    """SLURM's signal before it takes the nodes: all ranks save at the same step, and the job requeues itself."""
    job = submit()
    if at_step:
        job.wait_for_step(at_step)
    else:
        job.cluster.wait(lambda: "from step 0" in job.log(), seconds=60)
    job.cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_for_restart()
    saved = int((job.save / "latest_checkpointed_iteration.txt").read_text())
    assert at_step <= saved < STEPS
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert len(job.records()) == STEPS and same_as(job, undisturbed)  # no step was repeated
    assert f"ended with code 0 at step {saved} of {STEPS}" in job.log() and "requeued" in job.log(), job.log()


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["head", "worker"])
def test_a_job_continues_after_losing_a_node(node: str, submit: Callable[..., Job], undisturbed: Job) -> None:
    job = submit()
    job.wait_for_step(SAVE_INTERVAL + 2)
    job.cluster.kill_node(node)
    try:
        job.wait_for_restart()
        assert job.wait_for_end() == "COMPLETED", job.log()
        assert same_as(job, undisturbed)
        assert node not in job.cluster.job(job.number)["NodeList"]
    finally:
        job.cluster.boot_node(node)


@pytest.mark.parametrize("restarts", [0, 1], ids=["requeued", "restarted by torchrun"])
def test_a_job_continues_after_losing_a_rank(restarts: int, submit: Callable[..., Job], undisturbed: Job) -> None:
    job = submit(max_restarts=restarts)
    job.wait_for_step(SAVE_INTERVAL + 2)
    rank = rank_on("n2", job)
    torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(torchrun, signal.SIGSTOP)  # it notices later than the other node's, whose rank lost its peer
    os.kill(rank, signal.SIGKILL)
    time.sleep(10)
    os.kill(torchrun, signal.SIGCONT)
    if not restarts:
        job.wait_for_restart()
        assert re.search(r"rank \d on n2 died first, at .*: killed by SIGKILL", job.log()), job.log()
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert same_as(job, undisturbed)
    assert job.cluster.job(job.number)["Restarts"] == str(1 - restarts)


# The first life loses the rank that writes the second checkpoint's tensors while they go to the disk.
KILLED_WHILE_SAVING = """
import os, signal

def killed(file):
    path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
    if "iter_0000010" in path:
        if "0" == os.environ.get("SLURM_RESTART_COUNT", "0") == os.environ["TORCHELASTIC_RESTART_COUNT"]:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)

fsync, os.fsync = os.fsync, killed
"""


@pytest.mark.parametrize("restarts", [0, 1], ids=["requeued", "restarted by torchrun"])
def test_a_job_continues_after_losing_a_rank_during_a_save(
    restarts: int, submit: Callable[..., Job], undisturbed: Job
) -> None:
    (undisturbed.folder / "sitecustomize.py").write_text(KILLED_WHILE_SAVING)
    path = f"{undisturbed.folder}:{os.environ.get('PYTHONPATH', '')}"
    job = submit(max_restarts=restarts, environment={"PYTHONPATH": path})
    if not restarts:
        job.wait_for_restart()
        assert "at step 5 of 40" in job.log() and re.search(r"rank 0 on n\d died first", job.log()), job.log()
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert same_as(job, undisturbed)
    assert job.log().count("step 10/40") == 2  # it was repeated
    assert job.cluster.job(job.number)["Restarts"] == str(1 - restarts)


def test_a_job_continues_after_a_rank_hangs(submit: Callable[..., Job], undisturbed: Job) -> None:
    """A frozen rank raises no error: the watchdogs of the others end the life and name it."""
    job = submit("--training.hang_timeout_minutes=0.1")
    job.wait_for_step(SAVE_INTERVAL + 2)
    os.kill(rank_on("n2", job), signal.SIGSTOP)
    job.wait_for_restart()
    assert re.search(r"died first, at .*: exit code 70: hang: .*(gave no sign of life|does not answer)", job.log())
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert same_as(job, undisturbed)


def rank_on(node: str, job: Job) -> int:
    """Return the process id of the job's rank on a node, as this host numbers it."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        name = f"SLURMD_NODENAME={node}".encode()
        if str(job.save).encode() in command and name in variables and b"LOCAL_RANK=0" in variables:
            return int(path.name)
    raise AssertionError(f"no rank of {job.folder} on {node}")


def test_a_refused_run_is_not_requeued(submit: Callable[..., Job]) -> None:
    job = submit("--data.seq_length=4096")
    assert job.wait_for_end() == "FAILED"
    assert "the run was refused: data.seq_length is 4096" in job.log()
    assert job.cluster.job(job.number)["Restarts"] == "0"


def test_a_node_that_does_not_see_the_folders_is_named(submit: Callable[..., Job]) -> None:
    """On one of the two nodes another file system covers the log folder."""
    hide = '[ "$(hostname -s)" = n1 ] || mount -t tmpfs none "$(dirname "$LIFE_LOGS")"'
    job = submit(setup=["source .venv/bin/activate", hide])
    assert job.wait_for_end() == "FAILED"
    assert f"n2 does not see {job.folder}/logs/{job.number}-1" in job.log(), job.log()
    assert "giving up: log_dir, checkpoint and data must be in folders that all nodes see" in job.log()
    assert job.cluster.job(job.number)["Restarts"] == "0"


@pytest.mark.parametrize("warned", [False, True], ids=["", "after it was warned"])
def test_a_cancelled_job_does_not_come_back(warned: bool, submit: Callable[..., Job]) -> None:
    job = submit("--training.global_batch_size=240")  # a second per step
    job.wait_for_step(1)
    if warned:
        job.cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
        job.cluster.wait(lambda: "told to stop" in job.log(), seconds=10)
    job.cluster.run("scancel", str(job.number))
    job.cluster.wait(lambda: job.cluster.run("squeue", "-h").strip() == "", seconds=60)
    assert job.cluster.job(job.number)["JobState"] == "CANCELLED" and "was cancelled" in job.log(), job.log()


def test_a_job_array_trains_in_pieces(submit: Callable[..., Job], undisturbed: Job) -> None:
    """For clusters on which a job cannot requeue itself: each job stops after 15 steps, the next resumes, and the last
    finds nothing to do."""
    job = submit("--training.exit_interval=15", slurm={"job_name": "pieces", "time": "10", "max_lives": 4})
    job.cluster.wait(lambda: job.cluster.run("squeue", "-h").strip() == "", seconds=240)
    assert len(job.records()) == STEPS and same_as(job, undisturbed)
    assert "nothing is left to do: step 40 of 40 is saved" in job.log()


def test_lives_without_progress_are_limited(submit: Callable[..., Job]) -> None:
    job = submit("--checkpoint.save_interval=0", slurm={"max_lives_without_progress": 1, "time": "10"})
    job.wait_for_step(3)
    os.kill(rank_on("n1", job), signal.SIGKILL)
    assert job.wait_for_end() == "FAILED"
    assert "giving up: 1 lives in a row saved nothing new" in job.log()
