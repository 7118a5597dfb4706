"""A run that is killed while it saves, or cannot save, resumes from its last complete checkpoint as if nothing had
happened. Checkpoints are full or delta, synchronous or asynchronous."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import programs
import workers
from megatron_llamapro.checkpoint.convert import megatron_to_hf
from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.testing.checkpoints import read_with_torch
from megatron_llamapro.testing.distributed import run_distributed

# The front door, killed at the second checkpoint in a function that saving calls. With asynchronous saves the fork is
# stopped first, so that the checkpoint remains half written during the test.
KILLED = """
import os, signal, sys, time
from pathlib import Path

def main(module, name, calls_before, config):
    from megatron_llamapro import pretrain
    from megatron_llamapro.runtime.upstream import import_megatron
    import_megatron()
    import importlib
    place = importlib.import_module(f"megatron_llamapro.training.checkpoints.{module}")
    original, calls, main_process = getattr(place, name), [], os.getpid()
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) > calls_before:
            os.kill(main_process, signal.SIGKILL)
            if os.getpid() != main_process:
                time.sleep(3)
                Path(config).with_name("orphan").write_text("wrote on")
        return original(*args, **kwargs)
    setattr(place, name, counted)
    sys.argv = ["pretrain", "--config", config]
    pretrain.main()

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
"""


def with_checkpoint(config: RunConfig, **fields: object) -> RunConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **fields))


def steps_in(save: Path) -> list[str]:
    return sorted(path.name for path in save.glob("iter_*"))


# Where the second checkpoint is interrupted: module, function, number of earlier calls, asynchronous.
PLACES = {
    "before the tensors": ("saver", "training_state", 1, False),
    "before it is published": ("saver", "publish", 1, False),
    "in the middle of the tensors": ("torch_dist_save", "_write", 1, False),
    "asynchronously, before it is published": ("saver", "publish", 1, True),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_while_saving_resumes(place: str, run_config: Callable, tmp_path: Path) -> None:
    module, function, calls, asynchronous = PLACES[place]
    config = run_config(train_iters=3, save="killed")
    config = with_checkpoint(config, save_interval=1, async_save=asynchronous)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = (module, function, calls, tmp_path / "run.yaml")
    assert programs.run(tmp_path / "killed.py", *arguments).returncode == -signal.SIGKILL
    save = Path(config.checkpoint.save)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    rest = run_distributed(workers.train, 1, config)[0].figures
    whole = run_distributed(workers.train, 1, run_config(train_iters=3, save="whole"))[0].figures
    assert rest == whole[1:]
    assert steps_in(save) == [f"iter_000000{step}" for step in (1, 2, 3)]


def test_a_rank_may_not_see_the_newest_checkpoint_yet(run_config: Callable) -> None:
    """For example on a network file system: all resume from the checkpoint that rank 0 sees."""
    config = with_checkpoint(run_config(train_iters=3), save_interval=1)
    whole = run_distributed(workers.train, 2, config)[0].figures
    save = Path(config.checkpoint.save)
    shutil.rmtree(save / "iter_0000003")
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    rest = run_distributed(stale_worker, 2, config)[0].figures
    assert rest == whole[2:]


def stale_worker(config: RunConfig) -> workers.Result:
    from megatron_llamapro.training.checkpoints import resume

    newest = resume.latest_checkpoint

    def stale(save: Path) -> Path | None:
        found = newest(save)
        return found.with_name("iter_0000001") if found and torch.distributed.get_rank() else found

    resume.latest_checkpoint = stale
    return workers.train(config)


def test_a_fork_that_writes_ends_with_its_killed_run(run_config: Callable, tmp_path: Path) -> None:
    """Otherwise the fork would hold its memory, including that of a GPU. It kills the run itself."""
    config = with_checkpoint(run_config(train_iters=2, save="killed"), save_interval=1, async_save=True)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    (tmp_path / "killed.py").write_text(KILLED)
    # Every fork inherits a count of 0 calls, so the first save is interrupted.
    arguments = ("torch_dist_save", "_write", 0, tmp_path / "run.yaml")
    assert programs.run(tmp_path / "killed.py", *arguments).returncode == -signal.SIGKILL
    save = Path(config.checkpoint.save)
    assert not (save / "latest_checkpointed_iteration.txt").exists()
    rest = run_distributed(workers.train, 1, config)[0].figures
    whole = run_distributed(workers.train, 1, run_config(train_iters=2, save="whole"))[0].figures
    assert rest == whole
    assert not (tmp_path / "orphan").exists()
    assert steps_in(save) == ["iter_0000001", "iter_0000002"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(asynchronous: bool, run_config: Callable) -> None:
    """From step 2 on, the kernel lets the second rank write no file above 20 kB, like a full disk or a quota. Both
    ranks raise the same line, and the checkpoint of step 1 can be resumed."""
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    config = run_config(train_iters=3, save="full", parallel=parallel)
    config = with_checkpoint(config, save_interval=1, async_save=asynchronous)
    messages = run_distributed(workers.train_on_a_full_disk, 2, config, 1)
    assert messages[0] == messages[1]
    assert "step 2 was not saved in" in messages[0] and "File too large" in messages[0]
    assert "(the last checkpoint is intact)" in messages[0] and "\n" not in messages[0]
    save = Path(config.checkpoint.save)
    assert steps_in(save) == ["iter_0000001"]
    rest = run_distributed(workers.train, 2, config)[0].figures
    whole = run_distributed(workers.train, 2, run_config(train_iters=3, save="whole", parallel=parallel))[0].figures
    assert rest == whole[1:]


def test_an_asynchronous_save_is_the_same(run_config: Callable) -> None:
    """Every tensor of weights and optimizer state, at every step, while training changes them. The second save of a
    step waits for the first."""
    saves = []
    for name, asynchronous in (("at_once", False), ("beside", True)):
        config = run_config(train_iters=3, save=name, dtype="bfloat16")
        config = with_checkpoint(config, save_interval=1, async_save=asynchronous)
        result = run_distributed(workers.train, 2, config)[0]
        assert [record["iteration"] for record in result.saves] == [1, 2, 3]
        saves.append(Path(config.checkpoint.save))
    for step in steps_in(saves[0]):
        one, other = (read_with_torch(save / step) for save in saves)
        assert one.keys() == other.keys() and any(name.startswith("optimizer.") for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_save_is_reported_and_holds_the_models_other_files(
    run_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from megatron_llamapro.training.metrics import ConsoleWriter

    source = shutil.copytree(run_config().model.checkpoint, tmp_path / "source")
    template = source / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("tools: {{ messages }}" * 1000)
    config = run_config(train_iters=2, checkpoint=source)
    config = with_checkpoint(config, save_interval=1, async_save=True)
    records = run_distributed(workers.train, 1, config)[0].saves
    for record in records:
        folder = Path(config.checkpoint.save) / f"iter_000000{record['iteration']}"
        assert (folder / template.relative_to(source)).read_bytes() == template.read_bytes()
        assert record["num_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0 < record["stall_seconds"] <= record["seconds"]
        assert record["delta"] and record["asynchronous"]
    megatron_to_hf(Path(config.checkpoint.save), tmp_path / "export")
    assert (tmp_path / "export" / template.relative_to(source)).read_bytes() == template.read_bytes()
    ConsoleWriter(train_iters=2).write({**records[0], "stall_seconds": 0.42, "seconds": 1.84, "num_bytes": 1.2e9})
    assert capsys.readouterr().out == "saved step 1: 0.4 s stall, 1.8 s in all, 1.2 GB\n"


def test_a_stage_with_nothing_to_train_logs_no_warning(run_config: Callable) -> None:
    """Otherwise every rank would log a line at every save."""
    config = run_config(
        train_iters=1, trainable=("final_norm",), parallel=ParallelConfig(pipeline_model_parallel_size=2)
    )
    assert run_distributed(warnings_worker, 2, config) == [[], []]


def warnings_worker(config: RunConfig) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron.core").addHandler(handler)
    try:
        workers.train(config)
    finally:
        logging.getLogger("megatron.core").removeHandler(handler)
    return lines


def test_old_checkpoints_are_removed(run_config: Callable) -> None:
    config = run_config(train_iters=5)
    config = with_checkpoint(config, save_interval=1, keep_last=1, keep_every=2)
    run_distributed(workers.train, 1, config)
    save = Path(config.checkpoint.save)
    assert steps_in(save) == ["iter_0000002", "iter_0000004", "iter_0000005"]
    assert (save / "base" / "metadata.json").is_file()
