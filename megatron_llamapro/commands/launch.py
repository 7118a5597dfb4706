"""Print or submit the sbatch job that trains a run to its end, through time limits, preemption and lost nodes.

llamapro launch --config run.yaml --launch slurm.yaml [--submit] [--section.field value …]
llamapro launch --config run.yaml --launch slurm.yaml --by_hand HOST      without a scheduler

docs/cluster.md shows how to get from a login node to a running job.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_llamapro.config.checks import data_parallel_size
from megatron_llamapro.config.command import CommandParser
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.config.io import options_with_homes, parse_run_config
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import expand_user
from megatron_llamapro.launch.config import LaunchConfig, read_launch_config
from megatron_llamapro.launch.slurm import commands_by_hand, sbatch_script


def main(arguments: Sequence[str]) -> int:
    """Read both configurations, print the job, and submit it if asked."""
    parser = CommandParser(prog="llamapro launch", description=__doc__)
    parser.add_argument("--launch", type=Path, required=True, metavar="FILE.yaml", help="nodes, SLURM, container, logs")
    parser.add_argument("--submit", action="store_true", help="also submit it with sbatch")
    parser.add_argument("--by_hand", metavar="HOST", help="print the commands to type on every node; HOST is the first")
    args, run_args = parser.parse_own_args(arguments)
    config, launch = parse_run_config(run_args), read_launch_config(args.launch)
    check_run(launch, config, run_args)
    run_args = [*with_absolute_configs(run_args), *options_with_homes(RunConfig, run_args)]
    if args.by_hand is not None and args.submit:
        raise ConfigError("--submit needs a scheduler, and --by_hand is for nodes without one: give only one of them")
    if args.by_hand is not None:
        print(commands_by_hand(launch, run_args, head=args.by_hand))
        return 0
    script = sbatch_script(launch, run_args, save=str(config.checkpoint.save), train_iters=config.training.train_iters)
    print(script, end="")
    return _submit(launch, config, script) if args.submit else 0


def _submit(launch: LaunchConfig, config: RunConfig, script: str) -> int:
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: sbatch is not installed here: run this on a cluster node, or copy the printed script to one"
        )
    for name in not_there(launch, config):
        print(
            f"warning: {name} does not exist yet: the run is refused if it does not exist when the job starts",
            file=sys.stderr,
        )
    log_dir = launch.from_here(launch.log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / f"{launch.slurm.job_name}.sbatch"
    write_atomically(path, script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    print(f"{done.stdout.strip()}; its script is {path}")
    return 0


_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def check_run(launch: LaunchConfig, run: RunConfig, run_args: Sequence[str] = ()) -> None:
    """Raise `ConfigError` if a run cannot be started this way: the ranks do not divide, a stopped run could not resume,
    or only one of several nodes would see a file. `run` was read from `run_args`."""
    data_parallel_size(run, launch.world_size)
    if run.checkpoint.save is None:
        raise ConfigError("checkpoint.save is not set: set it, because a stopped job resumes from its checkpoints")
    own = {"log_dir": launch.log_dir, "working_dir": ".", "checkpoint.save": run.checkpoint.save}
    _check_mounts(launch, own)
    if launch.nodes.num_nodes == 1:
        return
    paths = {
        **own,
        "model.checkpoint": run.model.checkpoint,
        "data.cache_dir": run.data.cache_dir or ".",
        "data.tokenizer": run.data.tokenizer or ".",
        **{f"data.train ({entry.prefix})": entry.prefix for entry in run.data.train},
        **{f"data.valid ({name})": prefix for name, prefix in run.data.valid.items()},
        **{f"--config {name}": path for name, path in _config_files(run_args).items()},
    }
    for name, path in paths.items():
        absolute = launch.from_here(path).absolute()
        for folder in _NODE_LOCAL:
            if absolute.is_relative_to(folder):
                raise ConfigError(
                    f"{name} is {absolute}, but each node has its own {folder}: name a folder that all nodes share"
                )


def _check_mounts(launch: LaunchConfig, paths: Mapping[str, str]) -> None:
    """Raise `ConfigError` if a mount renames one of `paths`. The job uses them outside the container, ranks inside."""
    for mount in launch.container_mounts:
        outside, inside = map(Path, mount.split(":")[:2])
        for name, path in paths.items():
            absolute = launch.from_here(path).absolute()
            if outside != inside and absolute.is_relative_to(inside):
                raise ConfigError(
                    f"{name} is {absolute}, which container_mounts maps from {outside}, but the job also uses the path "
                    f"outside the container: mount the folder under its own name ({outside}:{outside}), and use that"
                )


def not_there(launch: LaunchConfig, run: RunConfig) -> Iterator[str]:
    """Yield the names of the run's inputs that do not exist now. In a container paths differ, so it yields none."""
    if launch.container_image is not None:
        return
    files = {f"data.train {entry.prefix}": f"{entry.prefix}.idx" for entry in run.data.train}
    for name, path in {f"model.checkpoint {run.model.checkpoint}": run.model.checkpoint, **files}.items():
        if not launch.from_here(path).exists():
            yield name


def with_absolute_configs(run_args: Sequence[str]) -> list[str]:
    """Return the arguments with absolute paths of `--config` files, because the job may run in another folder."""
    files = _config_files(run_args)
    changed = []
    for before, word in itertools.pairwise(["", *run_args]):
        if before == "--config":
            changed.append(files[word])
        elif word.startswith("--config="):
            changed += ["--config", files[word.removeprefix("--config=")]]
        else:
            changed.append(word)
    return changed


def _config_files(run_args: Sequence[str]) -> dict[str, str]:
    """Return the absolute paths of configuration files, by the names that were given."""
    named = [after for word, after in itertools.pairwise(run_args) if word == "--config"]
    named += [word.removeprefix("--config=") for word in run_args if word.startswith("--config=")]
    return {name: str(Path(expand_user(name)).absolute()) for name in named}
