"""What tools/launch_slurm.py does once its options are read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.launch.config import LaunchConfig, check_run
from megatron_llamapro.launch.slurm import log_folder, sbatch_script
from megatron_llamapro.launch.torchrun import commands_by_hand


def run(launch: LaunchConfig, config: RunConfig, run_args: Sequence[str], *, by_hand: str | None, submit: bool) -> int:
    """Print the job, and submit it where asked. `run_args` are those that `config` was read from."""
    check_run(launch, config)
    if by_hand is not None:
        print(commands_by_hand(launch, run_args, head=by_hand))
        return 0
    script = sbatch_script(launch, run_args, save=str(config.checkpoint.save), train_iters=config.training.train_iters)
    print(script, end="")
    return _submit(launch, script) if submit else 0


def _submit(launch: LaunchConfig, script: str) -> int:
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: there is no sbatch here: go to a node of the cluster, or take the printed script there"
        )
    log_dir = log_folder(launch)
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / f"{launch.slurm.job_name}.sbatch"
    write_atomically(path, script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    print(f"{done.stdout.strip()}; its script is {path}")
    return 0
