"""This process's rank in the world, from environment variables, checked before anything waits. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_llamapro.config.errors import ConfigError

_PLACE = ("RANK", "WORLD_SIZE")
_NEEDED = (*_PLACE, "MASTER_ADDR", "MASTER_PORT")

# Launchers that start several processes but set none of the above, by the variable that holds the number of processes.
_OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}

_WITH_TORCHRUN = "start it with torchrun --nproc-per-node N -m megatron_llamapro.pretrain …, which sets them"


@dataclass(frozen=True)
class LaunchedRank:
    """One rank of several, as torchrun's variables describe it."""

    rank: int
    world_size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}, which meet at {self.address}:{self.port}"


def world_of_environment(variables: Mapping[str, str]) -> LaunchedRank | None:
    """Return this process's place among the ranks, or None if it is the only process.

    Raises:
        ConfigError: only some of the variables are set, or they contradict each other; or another launcher started
            several processes, and each would be a separate run in the same folder.
    """
    given = [name for name in _PLACE if name in variables]
    if not given:
        _check_alone(variables)
        return None
    missing = [name for name in _NEEDED if not variables.get(name)]
    if missing:
        said = ", ".join(f"{name}={variables[name]}" for name in _NEEDED if name in variables)
        raise ConfigError(
            f"the environment has {said}, but not {', '.join(missing)}: {_WITH_TORCHRUN}; for one process without it, "
            f"unset {' '.join(given)}"
        )
    rank, world_size, port = (_number(variables, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world_size:
        raise ConfigError(
            f"the environment has RANK={rank} and WORLD_SIZE={world_size}: ranks go from 0 to WORLD_SIZE - 1; "
            f"{_WITH_TORCHRUN}"
        )
    if not 0 < port < 65536:
        raise ConfigError(f"the environment has MASTER_PORT={port}: a port is a number from 1 to 65535")
    if "LOCAL_RANK" in variables:
        _number(variables, "LOCAL_RANK")
    return LaunchedRank(rank, world_size, variables["MASTER_ADDR"], port)


def launched_world_size() -> int:
    """Return the number of ranks of this start. Raises what `world_of_environment` raises."""
    launched = world_of_environment(os.environ)
    return launched.world_size if launched else 1


def _check_alone(variables: Mapping[str, str]) -> None:
    for name, launcher in _OTHER_LAUNCHERS.items():
        count = variables.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise ConfigError(
                f"{launcher} started {count} processes ({name}), but {', '.join(_NEEDED)} are not set: each would be a "
                "separate run; start one torchrun on each node, which starts the ranks (llamapro launch "
                "writes such a job)"
            )


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"the environment has {name}={variables[name]}: it must be a number; {_WITH_TORCHRUN}")
    return int(text)


def check_device(local_rank: int, *, num_devices: int) -> None:
    """Raise `ConfigError` if this node has no GPU for this rank."""
    if local_rank >= num_devices:
        raise ConfigError(
            f"this is rank {local_rank} of its node (LOCAL_RANK, from 0), which has {num_devices} "
            f"GPU{'s' * (num_devices != 1)}: each rank needs its own; start at most {num_devices} per node "
            "(--nproc-per-node)"
        )
