"""How a run is started on a cluster: frozen, typed data, from a YAML file of its own. Needs no torch.

Field names are SLURM's and torchrun's. Attribute docstrings are the help text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_llamapro.config.checks import data_parallel_size
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.io import parse_sections
from megatron_llamapro.config.schema import RunConfig

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
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


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

    log_dir: str
    """Folder for the logs, on a file system that all nodes share."""
    nodes: NodesConfig = field(default_factory=NodesConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    working_dir: str | None = None
    """Folder that the ranks run in, shared by all nodes; without it, the one the job is submitted from."""
    setup: tuple[str, ...] = ()
    """Lines of shell for every node before anything else: module load, source …/bin/activate, export ….  In a container
    they run inside it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables on every node, e.g. NCCL_SOCKET_IFNAME: bond0."""
    container_image: str | None = None
    """Image that the ranks run in."""
    container_runtime: ContainerRuntime = "pyxis"
    """What runs it: pyxis (srun --container-image) or apptainer."""
    container_mounts: tuple[str, ...] = ()
    """Folders that are seen inside, as host:container."""
    rendezvous_port: int | None = None
    """Port on the first node, where ranks find each other; without it, one that the job's number gives."""
    max_restarts: int = 0
    """Times that torchrun starts all ranks again within a life, when one died."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes.num_nodes * self.nodes.processes_per_node


def read_launch_config(path: Path, overrides: Sequence[str] = ()) -> LaunchConfig:
    """The launch configuration of a YAML file.

    Raises:
        ConfigError: a file that is not there, a key that does not exist (with the nearest that does), a value of the
            wrong type, or values that cannot be.
    """
    config = parse_sections(LaunchConfig, ["--config", str(path), *overrides])
    check_launch_config(config)
    return config


def check_launch_config(config: LaunchConfig) -> None:
    """Raise `ConfigError` where values are out of range or contradict each other."""
    nodes, slurm = config.nodes, config.slurm
    for section, name, least in (
        (nodes, "num_nodes", 1),
        (nodes, "processes_per_node", 1),
        (slurm, "signal_seconds", 1),
        (slurm, "max_lives_without_progress", 1),
        (config, "max_restarts", 0),
    ):
        if getattr(section, name) < least:
            raise ConfigError(f"{name} is {getattr(section, name)}: it must be at least {least}")
    if nodes.gpus_per_node is not None and nodes.processes_per_node > nodes.gpus_per_node:
        raise ConfigError(
            f"nodes.processes_per_node ({nodes.processes_per_node}) is more than nodes.gpus_per_node "
            f"({nodes.gpus_per_node}): a rank needs a GPU of its own"
        )
    if slurm.max_lives is not None and slurm.max_lives < 1:
        raise ConfigError(f"slurm.max_lives is {slurm.max_lives}: it must be at least 1; leave it out to requeue")
    if not _TIME.fullmatch(slurm.time):
        raise ConfigError(f"slurm.time is {slurm.time!r}: it is like 90, 24:00:00 or 2-00:00:00")
    if any("\n" in line for line in (*slurm.options, slurm.job_name, slurm.partition or "", slurm.account or "")):
        raise ConfigError("slurm: an option has a line break in it")
    for option in slurm.options:
        if not option.startswith("-"):
            raise ConfigError(f"slurm.options has {option!r}: an option of sbatch begins with -, e.g. --qos=long")
    for name in config.environment:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"environment names {name!r}, which is no variable's name")
    if config.rendezvous_port is not None and not 1024 <= config.rendezvous_port <= 65535:
        raise ConfigError(f"rendezvous_port is {config.rendezvous_port}: it is from 1024 to 65535")
    for mount in config.container_mounts:
        if ":" not in mount:
            raise ConfigError(f"container_mounts has {mount!r}: it is host:container")


def check_run(launch: LaunchConfig, run: RunConfig) -> None:
    """Raise `ConfigError` where a run cannot be started so: ranks that do not divide, nothing to go on from after a
    stop, or files that only one of several nodes would see."""
    data_parallel_size(run, launch.world_size)
    if run.checkpoint.save is None:
        raise ConfigError("checkpoint.save is not set: a job that is stopped goes on from its checkpoints")
    if launch.nodes.num_nodes == 1:
        return
    paths = {
        "log_dir": launch.log_dir,
        "working_dir": launch.working_dir or ".",
        "model.checkpoint": run.model.checkpoint,
        "checkpoint.save": run.checkpoint.save,
        "data.cache_dir": run.data.cache_dir or ".",
        "data.tokenizer": run.data.tokenizer or ".",
        **{f"data.train ({entry.prefix})": entry.prefix for entry in run.data.train},
        **{f"data.valid ({name})": prefix for name, prefix in run.data.valid.items()},
    }
    for name, path in paths.items():
        absolute = str((Path(launch.working_dir or ".") / path).absolute())
        if absolute.startswith(tuple(f"{folder}/" for folder in _NODE_LOCAL)):
            raise ConfigError(f"{name} is {path}, which each node has for itself: name a folder that all nodes share")


def environment_of(launch: LaunchConfig) -> dict[str, str]:
    """Variables that every node gets."""
    return {**DEFAULT_ENVIRONMENT, **launch.environment}
