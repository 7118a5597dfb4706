"""Signals to a whole run, sent to each of its processes as a scheduler, a terminal and torchrun do. The saved state
equals that of the undisturbed run at the same step."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy
import pytest
import torch

import workers
from megatron_llamapro.config.command import TRY_AGAIN
from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.config.schema import BlendEntry, ParallelConfig
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.distributed import run_distributed
from programs import Program

PRETRAIN = ["-m", "megatron_llamapro.pretrain"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PRETRAIN]
MANY = 1000  # enough steps that only the signal ends the run


class Started:
    """A run as a program, in its own process group."""

    def __init__(
        self,
        config,
        folder: Path,
        *,
        command: Sequence[str] = PRETRAIN,
        place: Mapping[str, str] | None = None,
        **options: object,
    ) -> None:
        """`options` are Popen's. Without any, and without torchrun, the process needs no imports."""
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(dump_yaml(config))
        self.config, self.output = config, folder / "output"
        self.output.touch()
        arguments = [*command, "--config", str(folder / "run.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(place or {})}
        if command is PRETRAIN and not options:
            self.process = Program(*arguments, output=self.output, env=environment)
            return
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                **{"stdout": output, "stderr": output, "start_new_session": True, **options},
            )

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 120
        while text not in self.output.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, list[str]]:
        """Return exit code and lines once no process of the run is left."""
        code = self.process.wait(timeout=120)
        self.wait_until_gone()
        return code, self.output.read_text().splitlines()

    def wait_until_gone(self, *, seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while left := processes_of(self):
            assert time.monotonic() < until, left
            time.sleep(0.05)

    def saved_step(self) -> int:
        return int((Path(self.config.checkpoint.save) / "latest_checkpointed_iteration.txt").read_text())


def processes_of(run: Started) -> list[int]:
    """Return the processes of its session, and torchrun's ranks, which have sessions of their own."""
    folder = f"{Path(run.config.checkpoint.save).parent}/".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            is_the_runs = int(session) == run.process.pid or folder in (path / "cmdline").read_bytes()
        except OSError:
            continue
        if is_the_runs and state != "Z":
            found.append(int(path.name))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    runs: list[Started] = []

    def start(config, name: str = "started", **options: object) -> Started:
        runs.append(Started(config, tmp_path / name, **options))
        return runs[-1]

    yield start
    for run in runs:
        for process in processes_of(run):
            os.kill(process, signal.SIGKILL)
        run.process.wait()


def with_workers(config, **checkpoint: object):
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, num_workers=2),
        checkpoint=dataclasses.replace(config.checkpoint, **checkpoint),
    )


def losses_of(run: Started) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every step."""
    lines = (Path(run.config.checkpoint.save) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return [(record["iteration"], record["loss"], record["grad_norm"]) for record in records]


@pytest.mark.parametrize(
    ("number", "code", "asynchronous"),
    [
        (signal.SIGTERM, 0, False),
        (signal.SIGHUP, 0, True),
        (signal.SIGINT, 130, True),
    ],
)
def test_a_signal_to_all_processes_saves(
    number: signal.Signals, code: int, asynchronous: bool, run_config: Callable, start: Callable
) -> None:
    """Including processes that load data and those that write a checkpoint beside training."""
    config = with_workers(run_config(train_iters=MANY), async_save=asynchronous, save_interval=2)
    run = start(config)
    run.wait_for(f"step    3/{MANY}")
    run.send(number)
    ended, lines = run.end()
    step, save = run.saved_step(), config.checkpoint.save
    assert ended == code, lines
    assert lines[-1] == (
        f"stopped after step {step} of {MANY}; checkpoint: {save}, step {step}; the same command resumes from it"
    )
    assert not [*Path(save).glob("*.tmp")]
    undisturbed = run_config(train_iters=MANY, save="undisturbed", exit_interval=step)
    [whole] = run_distributed(workers.train, 1, undisturbed)
    assert losses_of(run) == [figures[:3] for figures in whole.figures] and len(whole.figures) == step
    theirs = read_tensors(Path(undisturbed.checkpoint.save))
    for name, tensor in read_tensors(Path(save)).items():
        assert torch.equal(tensor, theirs[name]), name


def test_data_loaders_end_with_a_killed_run(run_config: Callable, start: Callable) -> None:
    config = with_workers(run_config(train_iters=MANY))
    run = start(config)
    run.wait_for(f"step    2/{MANY}")
    assert len(processes_of(run)) == 3
    run.process.kill()
    run.wait_until_gone(seconds=3)  # torch's own workers look every 5 seconds


def test_a_failed_save_ends_a_run_with_data_loaders(run_config: Callable, start: Callable) -> None:
    """A file-size limit stands in for a full disk. No process waits for a data loader."""
    run = start(with_workers(run_config(train_iters=MANY), save_interval=20))
    run.wait_for("step    3/")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    code, lines = run.end()
    assert code == TRY_AGAIN and "was not saved in" in lines[-1], lines[-5:]


def test_a_bad_sample_ends_a_run_with_data_loaders(run_config: Callable, start: Callable, tmp_path: Path) -> None:
    config = with_workers(run_config(train_iters=MANY))
    for entry in config.data.train:
        for ending in (".bin", ".idx"):
            shutil.copy(f"{entry.prefix}{ending}", tmp_path)
    prefix = tmp_path / Path(config.data.train[0].prefix).name
    tokens = numpy.fromfile(f"{prefix}.bin", dtype=numpy.uint16)
    tokens[::50] = 60_000
    tokens.tofile(f"{prefix}.bin")
    run = start(dataclasses.replace(config, data=dataclasses.replace(config.data, train=(BlendEntry(str(prefix)),))))
    code, lines = run.end()
    assert code == 2 and "error: step 1:" in lines[-1] and "holds token 60000" in lines[-1], lines[-5:]


def test_a_second_interrupt_ends_at_once(run_config: Callable, start: Callable) -> None:
    """In the middle of a step that takes some seconds."""
    config = with_workers(run_config(train_iters=MANY, global_batch_size=250), save_interval=1)
    run = start(config)
    run.wait_for("saved step 1")
    for _ in range(2):
        run.send(signal.SIGINT)
        time.sleep(0.7)
    code, lines = run.end()
    assert code == 130
    step, save = run.saved_step(), config.checkpoint.save
    assert lines[-1] == (
        f"error: interrupted at once, unsaved steps are lost; checkpoint: {save}, step {step}; the same command "
        "resumes from it"
    )


def test_closing_the_terminal_saves(run_config: Callable, start: Callable) -> None:
    """The terminal hangs up on the run; from then on printing is an error."""
    config = run_config(train_iters=MANY)
    ours, theirs = pty.openpty()
    run = start(
        config,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = b""
    while b"step    3/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    code, _ = run.end()
    assert code == 0 and run.saved_step() == losses_of(run)[-1][0] >= 3


def test_a_run_outlives_the_reader_of_its_output(run_config: Callable, start: Callable) -> None:
    """For example `| tee` when tee is killed."""
    ear, mouth = os.pipe()
    run = start(run_config(train_iters=4), stdout=mouth, stderr=mouth)
    os.close(mouth)
    assert b"stage 0" in os.read(ear, 4096)
    os.close(ear)
    code, _ = run.end()
    assert code == 0 and run.saved_step() == len(losses_of(run)) == 4


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_below_torchrun_saves_or_ends(times: int, run_config: Callable, start: Callable) -> None:
    """A terminal's Ctrl-C reaches torchrun only, because its ranks have sessions of their own. It passes the first
    on as SIGINT, the second as SIGTERM, and exits with 1."""
    batch = 500 if times == 2 else 4  # the second comes in the middle of a step
    config = with_workers(run_config(train_iters=MANY, global_batch_size=batch), save_interval=1)
    run = start(config, command=TORCHRUN)
    run.wait_for("saved step 1")
    for _ in range(times):
        run.send(signal.SIGINT)
        time.sleep(0.7)
    code, lines = run.end()
    step = run.saved_step()
    said = "stopped after step" if times == 1 else "error: interrupted at once"
    assert code == 1
    [line] = [line for line in lines if line.startswith(said)]
    assert line.endswith(f"step {step}; the same command resumes from it")


def records_when_told(config, kind: str, iteration: int) -> list[tuple[str, int]]:
    """Return the records of a run whose rank 0 is told to stop when it writes the named record."""
    from megatron_llamapro.runtime.stop import StopRequest
    from megatron_llamapro.training.loop import train
    from megatron_llamapro.training.setup import set_up

    class Telling(list):
        def write(self, record: dict) -> None:
            self.append((record["kind"], record["iteration"]))
            if self[-1] == (kind, iteration):
                os.kill(os.getpid(), signal.SIGTERM)

    stop, run = StopRequest(), set_up(config)
    records = Telling()
    train(run, [records] if run.layout.rank == 0 else [], stop)
    return [*records]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stop_in_an_evaluation_or_a_save_needs_no_further_step(asynchronous: bool, run_config: Callable) -> None:
    start = [("eval", 0), ("train", 1)]
    config = run_config(train_iters=6, eval_interval=2)
    for name, told, rest in (
        (
            "step",
            ("train", 1),
            [("train", 2), ("save", 2), ("eval", 2)],
        ),  # the requested save comes before the evaluation
        ("eval", ("eval", 2), [("train", 2), ("eval", 2), ("save", 2)]),
    ):
        kept = dataclasses.replace(config.checkpoint, save=f"{config.checkpoint.save}-{name}", async_save=asynchronous)
        [records, _] = run_distributed(records_when_told, 2, dataclasses.replace(config, checkpoint=kept), *told)
        assert records == start + rest, name


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_reported_in_the_configured_time(rank: int, run_config: Callable, start: Callable) -> None:
    """One line; torch itself takes several times as long."""
    config = run_config(parallel=ParallelConfig(distributed_timeout_minutes=0.05))
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = start(config, place=place)
    code, lines = run.end()
    assert code == TRY_AGAIN
    assert lines[-1].startswith("error: the ranks did not find one another in 0.05 minutes"), lines
    assert f"rank {rank} of 2, which meet at 127.0.0.1:{place['MASTER_PORT']}" in lines[-1]


def test_a_rank_that_waits_for_others_hears_sigterm(run_config: Callable, start: Callable) -> None:
    config, port = run_config(), free_port()
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = start(config, place=place)
    until = time.monotonic() + 60
    while f":{port:04X} " not in Path("/proc/net/tcp6").read_text() + Path("/proc/net/tcp").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    run.send(signal.SIGTERM)
    assert run.end() == (
        143,
        [f"error: stopped by SIGTERM before the first step; nothing was saved yet in {config.checkpoint.save}"],
    )
