"""The rank and world from the environment: torch's variables all set or none, and launchers that set none of them."""

from __future__ import annotations

import pytest

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.runtime.launched import LaunchedRank, check_device, world_of_environment

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}

REFUSED = {
    "WORLD_SIZE=1": "has WORLD_SIZE=1, but not RANK, MASTER_ADDR, MASTER_PORT: start it with torchrun",
    "RANK=0": "has RANK=0, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    "WORLD_SIZE=4 RANK=0": "but not MASTER_ADDR, MASTER_PORT: start it with torchrun",
    "WORLD_SIZE=4 RANK=0 MASTER_ADDR=n1": "but not MASTER_PORT: start it",
    "WORLD_SIZE=4 RANK=0 MASTER_ADDR= MASTER_PORT=1": "but not MASTER_ADDR: start it",
    "WORLD_SIZE=1 RANK=1 MASTER_ADDR=n1 MASTER_PORT=1": "RANK=1 and WORLD_SIZE=1: ranks go from 0",
    "WORLD_SIZE=x RANK=1 MASTER_ADDR=n1 MASTER_PORT=1": "has WORLD_SIZE=x: it must be a number",
    "WORLD_SIZE=2 RANK=-1 MASTER_ADDR=n1 MASTER_PORT=1": "has RANK=-1: it must be a number",
    "WORLD_SIZE=2 RANK=1 MASTER_ADDR=n1 MASTER_PORT=tcp://10.0.0.1:80": "has MASTER_PORT=tcp",
    "WORLD_SIZE=2 RANK=1 MASTER_ADDR=n1 MASTER_PORT=70000": "from 1 to 65535",
    "WORLD_SIZE=2 RANK=1 MASTER_ADDR=n1 MASTER_PORT=1 LOCAL_RANK=": "has LOCAL_RANK=: it must be a number",
    "SLURM_STEP_NUM_TASKS=8": "srun started 8 processes (SLURM_STEP_NUM_TASKS), but RANK",
    "OMPI_COMM_WORLD_SIZE=2": "mpirun started 2 processes",
    "PMI_SIZE=2": "mpirun started 2 processes",
}


def variables_of(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


@pytest.mark.parametrize("text", REFUSED)
def test_impossible_variables_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        world_of_environment(variables_of(text))
    assert REFUSED[text] in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["", "MASTER_ADDR=n1 MASTER_PORT=1", "SLURM_NTASKS=8 SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS=1", "LOCAL_RANK=0"],
)
def test_a_process_without_torchs_variables_is_alone(text: str) -> None:
    """A batch script sees the tasks of its job but is one process; so is a shell on a node (srun --pty bash)."""
    assert world_of_environment(variables_of(text)) is None


def test_a_rank_of_several_is_recognised() -> None:
    """Also if srun started torchrun on every node."""
    found = world_of_environment({**WHOLE, "SLURM_STEP_NUM_TASKS": "2", "LOCAL_RANK": "0"})
    assert found == LaunchedRank(rank=1, world_size=2, address="n1", port=29500)


def test_a_rank_without_a_gpu_is_refused() -> None:
    check_device(1, num_devices=2)
    with pytest.raises(ConfigError, match=r"this is rank 2 of its node .*, which has 2 GPUs: .* start at most 2"):
        check_device(2, num_devices=2)
