"""The text of an sbatch job that trains to the end despite time limits, preemption and lost nodes; also torchrun's
command line. Pure functions.

This module writes the options and variables from the configuration. `job.sh` says what the job does with them,
`node.sh` what every node does. Both files are copied unchanged.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_llamapro.launch.config import LaunchConfig, environment_of

_NODE, _JOB = (Path(__file__).with_name(name) for name in ("node.sh", "job.sh"))


def sbatch_script(launch: LaunchConfig, run_args: Sequence[str], *, save: str, train_iters: int) -> str:
    """Return the whole script. `run_args` are pretrain's arguments, `save` is checkpoint.save. The run is finished at
    step `train_iters`."""
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in _options(launch)),
            "",
            "# shellcheck disable=SC1091,SC2329",
            "set -uo pipefail",
            *([f"cd {shlex.quote(launch.working_dir)} || exit 1"] if launch.working_dir else []),
            # In SLURM 22.05 to 23.02, srun does not inherit it from sbatch, and binds all ranks to one core.
            *([f"export SRUN_CPUS_PER_TASK={launch.nodes.cpus_per_node}"] if launch.nodes.cpus_per_node else []),
            f"LOG_DIR={shlex.quote(launch.log_dir)}",
            f"SAVE={shlex.quote(save)}",
            f"TRAIN_ITERS={train_iters}",
            f"MAX_LIVES_WITHOUT_PROGRESS={launch.slurm.max_lives_without_progress}",
            f"PORT={launch.rendezvous_port or ''}",  # set even if empty: the user's environment may have a PORT
            f"CONTAINER=({' '.join(_container(launch))})",
            "",
            "# Runs on every node before its ranks, inside the container if any: its variables would override srun's.",
            *_function("setup", [*exports(launch), *launch.setup]),
            "",
            *_function("ranks", _ranks(launch, run_args)),
            "",
            _NODE.read_text(encoding="utf-8"),
            _JOB.read_text(encoding="utf-8"),
        ]
    )


def _options(launch: LaunchConfig) -> Iterator[str]:
    nodes, slurm = launch.nodes, launch.slurm
    yield f"--job-name={shlex.quote(slurm.job_name)}"
    yield f"--nodes={nodes.num_nodes}"
    yield "--ntasks-per-node=1"
    for name, value in (
        ("gpus-per-node", nodes.gpus_per_node),
        ("cpus-per-task", nodes.cpus_per_node),
        ("mem", nodes.memory_per_node),
        ("partition", slurm.partition),
        ("account", slurm.account),
    ):
        if value is not None:
            yield f"--{name}={shlex.quote(str(value))}"  # sbatch parses quotes like a shell
    yield f"--time={slurm.time}"
    yield f"--signal=B:USR1@{slurm.signal_seconds}"
    if slurm.max_lives is None:
        yield "--requeue"
    else:
        yield f"--array=1-{slurm.max_lives}%1"
    yield "--open-mode=append"
    yield f"--output={shlex.quote(str(launch.from_here(launch.log_dir) / '%x-%j.out'))}"
    yield from slurm.options


def _container(launch: LaunchConfig) -> list[str]:
    """Return the words of shell between srun and the ranks' shell."""
    if launch.container_image is None:
        return []
    image, mounts = shlex.quote(launch.container_image), shlex.quote(",".join(launch.container_mounts))
    has_mounts = bool(launch.container_mounts)
    if launch.container_runtime == "pyxis":  # without --container-workdir it starts in the image's folder
        words = [f"--container-image={image}", '--container-workdir="$PWD"']
        return [*words, *([f"--container-mounts={mounts}"] if has_mounts else [])]
    return ["apptainer", "exec", "--nv", *(["--bind", mounts] if has_mounts else []), image]


def _ranks(launch: LaunchConfig, run_args: Sequence[str]) -> list[str]:
    """Return the lines of shell that start a node's ranks. The node fills in the variables."""
    endpoint = '"$HEAD_NODE:$PORT"' if launch.nodes.num_nodes > 1 else None
    words = torchrun_arguments(launch, endpoint=endpoint, run_id='"$LIFE"', log_dir='"$LIFE_LOGS/$node"')
    return [
        "trap '' USR1",
        "setup",
        "set +efu # setup may have set them",
        "node=$(hostname -s)",
        "told_to_end=0",
        '[ -d "$LIFE_LOGS" ] || not_seen',
        """exec > >(trap '' TERM; exec tee -a "$LIFE_LOGS/$node.log") 2>&1""",
        " ".join([*words, *map(shlex.quote, run_args), "&"]),
        "torchrun=$!",
        "wait_for_torchrun",
        "code=$?",
        'touch "$LIFE_LOGS/$node.ended"',
        '[ "$code" = 0 ] || let_others_speak',
        "sleep 1 # so that tee can write the rest",
        'exit "$code"',
    ]


def _function(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name}() {{", *(f"    {line}" for line in lines), "}"]


MODULE = "megatron_llamapro.pretrain"


def torchrun_arguments(launch: LaunchConfig, *, endpoint: str | None, run_id: str, log_dir: str) -> list[str]:
    """Return torchrun's command up to the program, for any node of the job. Arguments that name variables are shell
    text.

    `endpoint` is host:port on the first node; None for a single node, which needs none.
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
    """Return the lines of shell that set every node's environment variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment_of(launch).items()]


def commands_by_hand(launch: LaunchConfig, run_args: Sequence[str], *, head: str) -> str:
    """Return the commands to type on every node if there is no scheduler, inside the container if there is one. `head`
    is the first node's name."""
    endpoint = f"{head}:{launch.rendezvous_port or 29400}" if launch.nodes.num_nodes > 1 else None
    arguments = torchrun_arguments(launch, endpoint=endpoint, run_id=launch.slurm.job_name, log_dir=launch.log_dir)
    where = [f"# in the container {launch.container_image}"] if launch.container_image else []
    where += [f"cd {shlex.quote(launch.working_dir)}"] if launch.working_dir else []
    return "\n".join([*where, *exports(launch), *launch.setup, shlex.join([*arguments, *run_args])])
