"""torchrun's command line. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_llamapro.launch.config import LaunchConfig, environment_of

MODULE = "megatron_llamapro.pretrain"


def torchrun_arguments(launch: LaunchConfig, *, endpoint: str | None, run_id: str, log_dir: str) -> list[str]:
    """Arguments of torchrun up to the program, for any node of the job; in shell text where they name variables.

    `endpoint` is host:port on the first node; None for one node, which needs none.
    """
    nodes = launch.nodes
    where = ["--standalone"]
    if endpoint is not None:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", run_id]
    return [
        "torchrun",
        *("--nnodes", str(nodes.num_nodes)),
        *("--nproc-per-node", str(nodes.processes_per_node)),
        *where,
        *("--max-restarts", str(launch.max_restarts)),
        *("--monitor-interval", "1"),
        *("--log-dir", log_dir),
        *("--tee", "3"),
        *("-m", MODULE),
    ]


def exports(launch: LaunchConfig) -> list[str]:
    """Lines of shell that set the variables that every node gets."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment_of(launch).items()]


def commands_by_hand(launch: LaunchConfig, run_args: Sequence[str], *, head: str) -> str:
    """What to type on every node where no scheduler is, in the container if there is one; `head` is the first node's
    name."""
    endpoint = f"{head}:{launch.rendezvous_port or 29400}" if launch.nodes.num_nodes > 1 else None
    arguments = torchrun_arguments(launch, endpoint=endpoint, run_id=launch.slurm.job_name, log_dir=launch.log_dir)
    where = [f"# in the container {launch.container_image}"] if launch.container_image else []
    where += [f"cd {shlex.quote(launch.working_dir)}"] if launch.working_dir else []
    return "\n".join([*where, *exports(launch), *launch.setup, shlex.join([*arguments, *run_args])])
