"""The command `llamapro average`: its output, and both ways to name checkpoints."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import workers
from megatron_llamapro.__main__ import run
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.testing.distributed import run_distributed


@pytest.fixture
def two_steps(run_config: Callable) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    config = run_config(train_iters=2)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save_interval=1))
    run_distributed(workers.train, 1, config)
    return Path(config.checkpoint.save)


def test_checkpoints_are_named_one_by_one_or_as_the_last_of_a_run(
    two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = sorted(two_steps.glob("iter_*"))
    for number, named in enumerate(
        (f"--checkpoint {one} {two}", f"--checkpoint {one} --checkpoint {two}", f"--run {two_steps} --last 2")
    ):
        target = tmp_path / str(number)
        assert run(shlex.split(f"average {named} --target {target}")) == 0
        shown = capsys.readouterr().out
        assert f"{target}: 6 layers" in shown and f"the mean of {one}, {two}" in shown
    files = {(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)}
    assert len(files) == 1
    run(shlex.split(f"average --run {two_steps} --last 2 --format torch_dist --target {tmp_path / 'megatron'}"))
    found = inspect(tmp_path / "megatron")
    assert found.format == "Megatron, torch_dist" and len(found.averaged) == 2
    with pytest.raises(
        CheckpointError, match=r"save has 2 complete checkpoints, not 3: name a run's folder, or fewer \("
    ):
        run(shlex.split(f"average --run {two_steps} --last 3 --target {tmp_path / 'more'}"))
