"""How a run is started on a cluster: frozen, typed data, from a YAML file of its own. Needs no torch.

Field names are SLURM's and torchrun's. Attribute docstrings are the help text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_llamapro.config.checks import check_ranges
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.fields import FilePath
from megatron_llamapro.config.io import parse_sections

ContainerRuntime = Literal["pyxis", "apptainer"]

# Set on every node unless `environment` says otherwise.
DEFAULT_ENVIRONMENT = {
    # megatron.core orders its kernels and messages by it, where tensor or sequence parallelism is on.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    # torch 2.13: without it, ranks that torchrun starts again look for each other at the dead ones' addresses.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"((?P<days>\d+)-)?(?P<rest>\d+(:\d\d){0,2})")
# Options of sbatch that are written already.
_SET_BY = {
    "--nodes": "nodes.num_nodes",
    "-N": "nodes.num_nodes",
    "--ntasks": "nodes.processes_per_node",
    "-n": "nodes.processes_per_node",
    "--ntasks-per-node": "nodes.processes_per_node",
    "--gpus-per-node": "nodes.gpus_per_node",
    "--cpus-per-task": "nodes.cpus_per_node",
    "-c": "nodes.cpus_per_node",
    "--mem": "nodes.memory_per_node",
    "--job-name": "slurm.job_name",
    "-J": "slurm.job_name",
    "--time": "slurm.time",
    "-t": "slurm.time",
    "--signal": "slurm.signal_seconds",
    "--array": "slurm.max_lives",
    "-a": "slurm.max_lives",
    "--output": "log_dir",
    "-o": "log_dir",
}


_NOT_REPLACED = re.compile(r"^~|[:=]~/|\$\w|\$[{(]")
_LEAST = {
    **dict.fromkeys(("nodes.num_nodes", "nodes.processes_per_node", "nodes.gpus_per_node", "nodes.cpus_per_node"), 1),
    **dict.fromkeys(("slurm.signal_seconds", "slurm.max_lives", "slurm.max_lives_without_progress"), 1),
    "max_restarts": 0,
    "rendezvous_port": 1024,
}
_MOST = {**dict.fromkeys([*_LEAST], 10**6), "rendezvous_port": 65535}


@dataclass(frozen=True)
class NodesConfig:
    """What the job runs on."""

    num_nodes: int = 1
    """Nodes."""
    processes_per_node: int = 8
    """Ranks a node: one a GPU."""
    gpus_per_node: int | None = 8
    """GPUs that are asked for on each node; null asks for none."""
    cpus_per_node: int | None = None
    """CPU cores that are asked for on each node; without it, the partition's default."""
    memory_per_node: str | None = None
    """Host memory, as sbatch takes it (0: all of the node's); without it, the partition's default."""


@dataclass(frozen=True)
class SlurmConfig:
    """What the scheduler is told."""

    job_name: str = "llamapro"
    """Of the job and its log file."""
    partition: str | None = None
    """Without it, the cluster's default."""
    account: str | None = None
    """Who pays; without it, the user's default."""
    time: str = "24:00:00"
    """Of one life of the job: minutes, hours:minutes:seconds, or days-hours:minutes:seconds."""
    signal_seconds: int = 300
    """How long before the end of that time the ranks are told to save and stop. SLURM may do it a minute earlier; a
    step and a save must fit in."""
    max_lives: int | None = None
    """Submit a job array of so many, one after the other, instead of one job that requeues itself. For clusters that do
    not allow requeueing; a job that finds the run finished ends at once."""
    max_lives_without_progress: int = 3
    """Give up after so many starts in a row that saved no new checkpoint."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, each as it stands behind #SBATCH, e.g. --qos=long."""


@dataclass(frozen=True)
class LaunchConfig:
    """How a run is started on a cluster."""

    log_dir: FilePath
    """Folder for the logs, on a file system that all nodes share."""
    nodes: NodesConfig = field(default_factory=NodesConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    working_dir: FilePath | None = None
    """Folder that the ranks run in, shared by all nodes; without it, the one the job is submitted from."""
    setup: tuple[str, ...] = ()
    """Lines of shell for every node before anything else: module load, source …/bin/activate, export ….  In a container
    they run inside it."""
    environment: dict[str, str | int | float] = field(default_factory=dict)
    """Variables on every node, e.g. NCCL_SOCKET_IFNAME: bond0. In a container they win over the image's."""
    container_image: FilePath | None = None
    """Image that the ranks run in."""
    container_runtime: ContainerRuntime = "pyxis"
    """What runs it: pyxis (srun --container-image) or apptainer."""
    container_mounts: tuple[FilePath, ...] = ()
    """Folders that are seen inside, as host:container; what has checkpoint.save and log_dir, by one name in both."""
    rendezvous_port: int | None = None
    """Port on the first node, where ranks find each other; without it, one that the job's number gives."""
    max_restarts: int = 0
    """Times that torchrun starts all ranks again within a life, when one died."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes.num_nodes * self.nodes.processes_per_node

    def from_here(self, path: str) -> Path:
        """A path of the job, seen from where it is submitted, which may be another folder than it runs in."""
        return Path(self.working_dir or ".") / path


def read_launch_config(path: Path, overrides: Sequence[str] = ()) -> LaunchConfig:
    """The launch configuration of a YAML file.

    Raises:
        ConfigError: a file that is not there, a key that does not exist (with the nearest that does), a value of the
            wrong type, or values that cannot be.
    """
    config = parse_sections(LaunchConfig, ["--config", str(path), *overrides])
    try:
        check_launch_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def check_launch_config(config: LaunchConfig) -> None:
    """Raise `ConfigError` where values are out of range or contradict each other."""
    nodes, slurm = config.nodes, config.slurm
    check_ranges(config, _LEAST, _MOST)
    if nodes.gpus_per_node is not None and nodes.processes_per_node > nodes.gpus_per_node:
        raise ConfigError(
            f"nodes.processes_per_node ({nodes.processes_per_node}) is more than nodes.gpus_per_node "
            f"({nodes.gpus_per_node}): a rank needs a GPU of its own"
        )
    seconds = _seconds(slurm.time)
    if slurm.signal_seconds >= seconds:
        raise ConfigError(
            f"slurm.signal_seconds is {slurm.signal_seconds}, and slurm.time {slurm.time} is {seconds} seconds: the "
            "ranks would be told to stop before they start"
        )
    if any("\n" in line for line in (*slurm.options, slurm.job_name, slurm.partition or "", slurm.account or "")):
        raise ConfigError("slurm: an option has a line break in it")
    for option in slurm.options:
        if not option.startswith("-"):
            raise ConfigError(f"slurm.options has {option!r}: an option of sbatch begins with -, e.g. --qos=long")
        if "=~" in option:
            raise ConfigError(f"slurm.options has {option!r}: sbatch does not replace ~: write the path itself")
        if field_name := _SET_BY.get(option.split("=")[0].split()[0]):
            raise ConfigError(f"slurm.options has {option!r}: that is for {field_name}")
    if not slurm.job_name or "/" in slurm.job_name:
        raise ConfigError(f"slurm.job_name is {slurm.job_name!r}: it names the job's files, so it has no / in it")
    for name, value in config.environment.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"environment names {name!r}, which is no variable's name")
        if isinstance(value, str) and _NOT_REPLACED.search(value):
            raise ConfigError(
                f"environment.{name} is {value!r}, and values are taken as they stand: write it without $ and ~, or "
                f'as a line of setup: export {name}="{value}"'
            )
    for mount in config.container_mounts:
        if ":" not in mount:
            raise ConfigError(f"container_mounts has {mount!r}: it is host:container")


def _seconds(time: str) -> int:
    """Of a time limit as sbatch takes it."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"slurm.time is {time!r}: it is like 90 (minutes), 24:00:00 or 2-00:00:00, in quotes")
    days, parts = found["days"], [int(part) for part in found["rest"].split(":")]
    unit = 3600 if days or len(parts) == 3 else 60  # D-H, D-H:M, D-H:M:S and H:M:S, or M and M:S
    return int(days or 0) * 86400 + sum(part * unit // 60**place for place, part in enumerate(parts))


def environment_of(launch: LaunchConfig) -> dict[str, str]:
    """Variables that every node gets."""
    return {**DEFAULT_ENVIRONMENT, **{name: str(value) for name, value in launch.environment.items()}}
