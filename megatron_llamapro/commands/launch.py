"""What tools/launch_slurm.py does once its options are read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.config.io import options_with_homes
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.launch.check import check_run, not_there, with_absolute_configs
from megatron_llamapro.launch.config import LaunchConfig
from megatron_llamapro.launch.slurm import sbatch_script
from megatron_llamapro.launch.torchrun import commands_by_hand


def run(launch: LaunchConfig, config: RunConfig, run_args: Sequence[str], *, by_hand: str | None, submit: bool) -> int:
    """Print the job, and submit it where asked. `run_args` are those that `config` was read from."""
    check_run(launch, config, run_args)
    run_args = [*with_absolute_configs(run_args), *options_with_homes(RunConfig, run_args)]
    if by_hand is not None and submit:
        raise ConfigError("--submit is for a scheduler and --by_hand for where there is none: give one of them")
    if by_hand is not None:
        print(commands_by_hand(launch, run_args, head=by_hand))
        return 0
    script = sbatch_script(launch, run_args, save=str(config.checkpoint.save), train_iters=config.training.train_iters)
    print(script, end="")
    return _submit(launch, config, script) if submit else 0


def _submit(launch: LaunchConfig, config: RunConfig, script: str) -> int:
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: there is no sbatch here: go to a node of the cluster, or take the printed script there"
        )
    for name in not_there(launch, config):
        print(f"warning: {name} is not there yet: the run is refused if it is not when the job starts", file=sys.stderr)
    log_dir = launch.from_here(launch.log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / f"{launch.slurm.job_name}.sbatch"
    write_atomically(path, script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    print(f"{done.stdout.strip()}; its script is {path}")
    return 0
