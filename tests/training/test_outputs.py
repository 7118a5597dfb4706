"""A run's folders and records through the front door: one run at a time, and all starts of a run in one record."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import offline_runs

import programs
import workers
from megatron_llamapro.config.io import dump_yaml, to_plain
from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.runtime.lock import RunLock
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.training.metrics_file import read_records


def with_logging(config: RunConfig, **fields: object) -> RunConfig:
    return dataclasses.replace(config, logging=dataclasses.replace(config.logging, **fields))


def with_save(config: RunConfig, **fields: object) -> RunConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **fields))


def front_door(config: RunConfig, folder: Path, world_size: int = 1, **environment: str) -> list[tuple[str, str]]:
    """Return, for every rank, the error that ended the run and the printed text."""
    return run_distributed(workers.front_door, world_size, config, folder, environment)


def steps_of(path: Path) -> list[int]:
    return [record["iteration"] for record in read_records(path) if record["kind"] == "train"]


def scalar_steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def losses_in(history: dict[int, dict]) -> list[tuple[int, float]]:
    return [(step, figures["train/loss"]) for step, figures in history.items() if "train/loss" in figures]


def test_every_step_is_once_in_every_record(run_config: Callable, tmp_path: Path) -> None:
    """A run of four steps, a run resumed from its step 2 as after a kill, and a new run in the same folders."""
    save, events, offline = tmp_path / "first", tmp_path / "events", {"WANDB_MODE": "offline"}
    config = with_save(run_config(save="first"), save_interval=2, async_save=True)
    config = with_logging(config, tensorboard_dir=str(events), wandb_project="pro")
    assert front_door(config, tmp_path, **offline)[0][0] == "no error"

    shutil.rmtree(save / "iter_0000004")
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert front_door(config, tmp_path, **offline)[0][0] == "no error"
    assert steps_of(save / "metrics.jsonl") == scalar_steps(events) == [1, 2, 3, 4]
    losses = [(r["iteration"], r["loss"]) for r in read_records(save / "metrics.jsonl") if r["kind"] == "train"]

    for path in [save / "latest_checkpointed_iteration.txt", *save.glob("iter_*")]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    kept = (save / "metrics.jsonl").read_bytes()
    shorter = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=1))
    [(error, said)] = front_door(shorter, tmp_path, **offline)
    assert error == "no error" and said.count("of an earlier run: moved to") == 2
    assert (save / "metrics.1.jsonl").read_bytes() == kept
    assert steps_of(save / "metrics.jsonl") == scalar_steps(events) == [1]
    assert scalar_steps(events / "earlier.1") == [1, 2, 3, 4]

    first, second, third = offline_runs(save)
    assert first.run_id == second.run_id != third.run_id == (save / "run_id.txt").read_text().strip()
    assert (first.project, first.name, first.exit_code) == ("pro", "first", 0)
    assert {name: value for name, value in second.config.items() if name != "_wandb"} == to_plain(config)
    assert losses_in(first.history) == losses and losses_in(second.history) == losses[2:]


def test_a_second_run_in_a_folder_is_refused(run_config: Callable, tmp_path: Path) -> None:
    """On all its ranks. It changes nothing of the first run: no draft of a checkpoint, no record."""
    config = run_config(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    save = Path(config.checkpoint.save)
    draft = save / "iter_0000004.ab12cd34.tmp"
    with RunLock(save / "run.lock", f"checkpoint.save ({save})"):
        draft.mkdir()
        (save / "metrics.jsonl").write_text('{"kind": "run", "iteration": 0}\n')
        (error, said), other = front_door(config, tmp_path, world_size=2)
        assert error.startswith(
            f"ConfigError: checkpoint.save ({save}) is in use by another run (process {os.getpid()} on "
        )
        assert said == "" and other == (error, "")
        assert sorted(path.name for path in save.iterdir()) == [draft.name, "metrics.jsonl", "run.lock"]


def test_a_killed_runs_lock_is_taken_over(run_config: Callable, tmp_path: Path) -> None:
    """The run is killed while it trains; the next one starts at once. Without checkpoint.save the lock is the metrics
    file's."""
    config = with_save(run_config(train_iters=2000), save=None)
    metrics, lock = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.lock"
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    arguments = ("-m", "megatron_llamapro.pretrain", "--config", tmp_path / "run.yaml")
    first = programs.Program(*arguments, output=tmp_path / "output", cwd=tmp_path)
    while first.poll() is None and not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        time.sleep(0.05)
    first.kill()
    first.wait(20)
    assert lock.exists()
    [(error, said)] = front_door(with_save(run_config(train_iters=1), save=None), tmp_path)
    assert error == "no error" and "waiting" not in said and not lock.exists()
    assert steps_of(metrics) == [1] and steps_of(tmp_path / "metrics.1.jsonl")[0] == 1


@pytest.mark.parametrize("name", ["/dev/null", "."])
def test_a_metrics_path_that_is_not_a_file_is_refused(name: str, run_config: Callable, tmp_path: Path) -> None:
    [(error, _)] = front_door(with_logging(run_config(), metrics_file=name), tmp_path)
    assert error == f"ConfigError: logging.metrics_file ({name}) is not a file: name one"
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("place", "reason"), [("metrics_file", "file is not a folder"), ("tensorboard_dir", "file/x: Not a directory")]
)
def test_an_unwritable_place_is_refused(place: str, reason: str, run_config: Callable, tmp_path: Path) -> None:
    """The error comes first, and nothing is left behind."""
    (tmp_path / "file").touch()
    config = with_logging(run_config(), **{place: str(tmp_path / "file" / "x")})
    [(error, said)] = front_door(config, tmp_path)
    assert error.startswith(f"ConfigError: logging.{place} ({tmp_path / 'file' / 'x'}) cannot be written: ")
    assert error.endswith(reason)
    assert said == "" and [path.name for path in tmp_path.iterdir()] == ["file"]
