"""A run that is killed while it saves goes on from its last complete checkpoint, as if it had not been."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import workers

from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.testing.distributed import run_distributed

# The front door, killed at the second checkpoint in a function that saving calls. (Saving spawns a process, hence the
# guard.)
KILLED = """
import os, signal, sys

def main(name, calls_before, config):
    from megatron_llamapro import pretrain
    from megatron_llamapro.runtime.upstream import import_megatron
    import_megatron()
    from megatron_llamapro.training import checkpointing
    original, calls = getattr(checkpointing, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) > calls_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(checkpointing, name, counted)
    sys.argv = ["pretrain", "--config", config]
    pretrain.main()

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""

# A function that saving calls, and how often the first checkpoint does.
PLACES = {"before the tensors": ("model_state", 2), "before it is published": ("_publish", 1)}


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_saving(place: str, run_config: Callable, tmp_path: Path) -> None:
    import dataclasses

    config = run_config(train_iters=3, save="killed")
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save_interval=1))
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    (tmp_path / "killed.py").write_text(KILLED)
    function, calls = PLACES[place]
    command = [sys.executable, str(tmp_path / "killed.py"), function, str(calls), str(tmp_path / "run.yaml")]
    assert subprocess.run(command, timeout=200).returncode == -signal.SIGKILL
    save = Path(config.checkpoint.save)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    rest = run_distributed(workers.train, 1, config)[0].figures
    whole = run_distributed(workers.train, 1, run_config(train_iters=3, save="whole"))[0].figures
    assert rest == whole[1:]
    assert sorted(path.name for path in save.glob("iter_*")) == [f"iter_000000{step}" for step in (1, 2, 3)]
