"""How to start a run on a cluster: frozen, typed data, read from its own YAML file. Needs no torch.

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
    # With tensor or sequence parallelism, megatron.core needs it to order its kernels and communication.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    # torch 2.13: without it, ranks that torchrun restarts look for each other at the addresses of the dead ranks.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"((?P<days>\d+)-)?(?P<rest>\d+(:\d\d){0,2})")
# Options of sbatch that have a field of their own.
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
    """The nodes that the job runs on."""

    num_nodes: int = 1
    """Number of nodes."""
    processes_per_node: int = 8
    """Ranks on each node, one per GPU."""
    gpus_per_node: int | None = 8
    """GPUs to request on each node; null requests none."""
    cpus_per_node: int | None = None
    """CPU cores to request on each node. If unset, the partition's default."""
    memory_per_node: str | None = None
    """Host memory to request on each node, in sbatch's format (0: all of it). If unset, the partition's default."""


@dataclass(frozen=True)
class SlurmConfig:
    """Settings of the SLURM job."""

    job_name: str = "llamapro"
    """Name of the job and of its log file."""
    partition: str | None = None
    """Partition to run in. If unset, the cluster's default."""
    account: str | None = None
    """Account to charge. If unset, the user's default."""
    time: str = "24:00:00"
    """Time limit of each life of the job: minutes, hours:minutes:seconds, or days-hours:minutes:seconds."""
    signal_seconds: int = 300
    """Seconds before the time limit at which the ranks are told to save and stop. A step and a save must fit in.
    SLURM may signal up to a minute earlier."""
    max_lives: int | None = None
    """Submit a job array of this many jobs, run one after the other, instead of one job that requeues itself. Use it
    if the cluster does not allow requeueing. A job that finds the run finished ends at once."""
    max_lives_without_progress: int = 3
    """Give up after this many starts in a row that saved no new checkpoint."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, each written as after #SBATCH, e.g. --qos=long."""


@dataclass(frozen=True)
class LaunchConfig:
    """How to start a run on a cluster."""

    log_dir: FilePath
    """Folder for the logs, on a file system that all nodes share."""
    nodes: NodesConfig = field(default_factory=NodesConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    working_dir: FilePath | None = None
    """Folder that the ranks run in, shared by all nodes. If unset, the folder from which the job is submitted."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run first on every node: module load, source …/bin/activate, export …. With a container they
    run inside it."""
    environment: dict[str, str | int | float] = field(default_factory=dict)
    """Environment variables on every node, e.g. NCCL_SOCKET_IFNAME: bond0. They override a container image's own."""
    container_image: FilePath | None = None
    """Container image that the ranks run in."""
    container_runtime: ContainerRuntime = "pyxis"
    """Program that runs the container: pyxis (srun --container-image) or apptainer."""
    container_mounts: tuple[FilePath, ...] = ()
    """Folders to mount, as host:container. checkpoint.save and log_dir must have the same path inside and outside."""
    rendezvous_port: int | None = None
    """Port on the first node at which the ranks find each other. If unset, it is derived from the job's number."""
    max_restarts: int = 0
    """How often torchrun restarts all ranks within a life after one of them died."""

    @property
    def world_size(self) -> int:
        """The total number of ranks."""
        return self.nodes.num_nodes * self.nodes.processes_per_node

    def from_here(self, path: str) -> Path:
        """Return a path of the job as seen from where it is submitted. The job may run in another folder."""
        return Path(self.working_dir or ".") / path


def read_launch_config(path: Path, overrides: Sequence[str] = ()) -> LaunchConfig:
    """Read the launch configuration from a YAML file.

    Raises:
        ConfigError: the file does not exist, a key is unknown (the message suggests the nearest one), a value has the
            wrong type, or values are out of range or contradict each other.
    """
    config = parse_sections(LaunchConfig, ["--config", str(path), *overrides])
    try:
        check_launch_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def check_launch_config(config: LaunchConfig) -> None:
    """Raise `ConfigError` if values are out of range or contradict each other."""
    nodes, slurm = config.nodes, config.slurm
    check_ranges(config, _LEAST, _MOST)
    if nodes.gpus_per_node is not None and nodes.processes_per_node > nodes.gpus_per_node:
        raise ConfigError(
            f"nodes.processes_per_node ({nodes.processes_per_node}) is more than nodes.gpus_per_node "
            f"({nodes.gpus_per_node}): each rank needs its own GPU"
        )
    seconds = _seconds(slurm.time)
    if slurm.signal_seconds >= seconds:
        raise ConfigError(
            f"slurm.signal_seconds is {slurm.signal_seconds}, but slurm.time {slurm.time} is {seconds} seconds: the "
            "ranks would be told to stop before they start"
        )
    if any("\n" in line for line in (*slurm.options, slurm.job_name, slurm.partition or "", slurm.account or "")):
        raise ConfigError("slurm: an option contains a line break")
    for option in slurm.options:
        if not option.startswith("-"):
            raise ConfigError(f"slurm.options has {option!r}: options of sbatch start with -, e.g. --qos=long")
        if "=~" in option:
            raise ConfigError(f"slurm.options has {option!r}: sbatch does not expand ~: write the whole path")
        if field_name := _SET_BY.get(option.split("=")[0].split()[0]):
            raise ConfigError(f"slurm.options has {option!r}: set {field_name} instead")
    if not slurm.job_name or "/" in slurm.job_name:
        raise ConfigError(f"slurm.job_name is {slurm.job_name!r}: it names files, so it must be a name without /")
    for name, value in config.environment.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"environment has {name!r}, which is not a valid variable name: rename it")
        if isinstance(value, str) and _NOT_REPLACED.search(value):
            raise ConfigError(
                f"environment.{name} is {value!r}, but values are not expanded: write it without $ and ~, or "
                f'as a line of setup: export {name}="{value}"'
            )
    for mount in config.container_mounts:
        if ":" not in mount:
            raise ConfigError(f"container_mounts has {mount!r}: write host:container")


def _seconds(time: str) -> int:
    """Convert a time limit in sbatch's format."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"slurm.time is {time!r}: write 90 (minutes), 24:00:00 or 2-00:00:00, in quotes")
    days, parts = found["days"], [int(part) for part in found["rest"].split(":")]
    unit = 3600 if days or len(parts) == 3 else 60  # D-H, D-H:M, D-H:M:S and H:M:S, or M and M:S
    return int(days or 0) * 86400 + sum(part * unit // 60**place for place, part in enumerate(parts))


def environment_of(launch: LaunchConfig) -> dict[str, str]:
    """Return the environment variables of every node."""
    return {**DEFAULT_ENVIRONMENT, **{name: str(value) for name, value in launch.environment.items()}}
