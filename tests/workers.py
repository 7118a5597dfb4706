"""Functions for the ranks of a training test. They run the program's own set-up and loop, without its command line.

    first, *others = run_distributed(workers.train, 2, run_config(train_iters=4))
    assert first.figures == others[0].figures

`run_distributed` (megatron_llamapro/testing/distributed.py) calls the function on every rank and returns one result per
rank, in rank order. `run_config` is a fixture of tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.config.schema import RunConfig

if TYPE_CHECKING:
    from megatron_llamapro.training.checkpoints.state import TrainingState
    from megatron_llamapro.training.step import StepResult


@dataclass
class Records:
    """A metrics writer that keeps its records in memory, and calls `on_step` after each training step."""

    records: list[dict] = field(default_factory=list)
    on_step: Callable[[int], None] = lambda step: None

    def write(self, record: dict) -> None:
        self.records.append(dict(record))
        if record["kind"] == "train":
            self.on_step(record["iteration"])

    def figures(self) -> list[tuple[int, float, float, float]]:
        """Return step, loss, gradient norm and learning rate of every step."""
        names = ("iteration", "loss", "grad_norm", "learning_rate")
        return [tuple(r[name] for name in names) for r in self.records if r["kind"] == "train"]

    def skips(self) -> list[tuple[int, str, int, int]]:
        """Return (step, outcome, skipped steps so far, skipped steps in a row) for every step without an update."""
        names = ("iteration", "outcome", "skipped_steps", "skipped_in_a_row")
        return [tuple(r[name] for name in names) for r in self.records if r["kind"] == "skip"]

    def saves(self) -> list[dict]:
        """Return the record of every save."""
        return [record for record in self.records if record["kind"] == "save"]

    def held_out(self) -> list[tuple[int, str, float]]:
        """Return (step, name of the held-out set, loss) of every evaluation."""
        return [(r["iteration"], r["name"], r["loss"]) for r in self.records if r["kind"] == "eval"]


@dataclass(frozen=True)
class Result:
    """The results of one rank; the lists are those of `Records`."""

    figures: list
    held_out: list
    blocks: list
    optimizer_bytes: int
    num_trainable: int
    saves: list
    skips: list
    penalties: list
    """Of every step's record; None if it has none."""


def train(config: RunConfig, sigterm_at: int | None = None) -> Result:
    """Set up, train and return this rank's result. At step `sigterm_at` rank 0 sends itself SIGTERM."""
    from megatron_llamapro.runtime.stop import StopRequest
    from megatron_llamapro.training.loop import train
    from megatron_llamapro.training.setup import set_up

    stop = StopRequest()
    run = set_up(config)
    writer = Records()
    if sigterm_at is not None and run.layout.rank == 0:
        writer.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == sigterm_at else None
    train(run, [writer], stop)
    state = [
        value
        for part in run.machine.optimizer.chained_optimizers
        if part.optimizer is not None
        for tensors in part.optimizer.state.values()
        for name, value in tensors.items()
        if name != "step"
    ]
    return Result(
        figures=writer.figures(),
        held_out=writer.held_out(),
        blocks=[record for record in writer.records if record["kind"] == "block"],
        optimizer_bytes=sum(value.nbytes for value in state),
        num_trainable=run.machine.report.num_trainable,
        saves=writer.saves(),
        skips=writer.skips(),
        penalties=[record.get("penalty") for record in writer.records if record["kind"] == "train"],
    )


def train_on_a_full_disk(config: RunConfig, full_after: int) -> str:
    """Train while the last rank cannot write files above 20 kB after step `full_after`, as on a full disk.

    Return the message of the `RunError` that ends the run on this rank, or "no error". Other errors are raised.
    """
    from megatron_llamapro.config.errors import RunError
    from megatron_llamapro.runtime.stop import StopRequest
    from megatron_llamapro.training import loop
    from megatron_llamapro.training.setup import set_up

    run = set_up(config)
    healthy, limits = loop._check_healthy, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(result: StepResult, state: TrainingState) -> None:
        healthy(result, state)
        if state.iteration == full_after + 1 and run.layout.rank == run.layout.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    loop._check_healthy = fill
    try:
        loop.train(run, [Records()], StopRequest())
    except RunError as error:
        return str(error)
    finally:
        loop._check_healthy = healthy
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


def printed(config: RunConfig) -> str:
    """Train and return the text that this rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train(config)
    return output.getvalue()


def set_up_errors(configs: list[RunConfig]) -> list[str]:
    """Set up each configuration. Return "Class: message" of this rank's `LlamaProError`, or "no error", for each."""
    from megatron_llamapro.config.errors import LlamaProError
    from megatron_llamapro.training.setup import set_up

    messages = []
    for config in configs:
        try:
            set_up(config)
            messages.append("no error")
        except LlamaProError as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def training_error(config: RunConfig) -> str:
    """Train and return the message of the `LlamaProError` that ends the run on this rank, or "no error"."""
    from megatron_llamapro.config.errors import LlamaProError

    try:
        train(config)
    except LlamaProError as error:
        return str(error)
    return "no error"


def front_door(config: RunConfig, folder: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Run pretrain in `folder`, from the point where the process group exists.

    Return "Class: message" of the `LlamaProError` that ends it, or "no error", and the printed text.
    """
    import contextlib
    import io

    from megatron_llamapro.config.errors import LlamaProError
    from megatron_llamapro.pretrain import _train
    from megatron_llamapro.runtime.stop import StopRequest

    os.chdir(folder)
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            _train(config, None, StopRequest())
        except LlamaProError as error:
            return f"{type(error).__name__}: {error}", said.getvalue()
    return "no error", said.getvalue()


def batches(config: RunConfig) -> list[tuple]:
    """Return tokens and labels, [samples, tokens], of each step of a run on one rank."""
    from megatron_llamapro.data.sampling import train_batches
    from megatron_llamapro.training.setup import set_up

    samples = config.training.global_batch_size
    read = train_batches(
        set_up(config).train_set,
        num_samples=config.data_order_samples,
        consumed_samples=0,
        micro_batch_size=samples,
        global_batch_size=samples,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    steps = [next(read) for _ in range(config.training.train_iters)]
    return [(step["tokens"], step["labels"]) for step in steps]
