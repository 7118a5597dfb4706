"""Launch files: an impossible setting is one line that says what to do."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.commands.launch import check_run, not_there, with_absolute_configs
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.launch.config import read_launch_config

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "slurm").glob("*.yaml"))
RUN = (
    "--model.checkpoint=/shared/model",
    "--data.train=[{prefix: /shared/text}]",
    "--data.seq_length=64",
    "--training.train_iters=100",
    "--training.micro_batch_size=1",
    "--training.global_batch_size=128",
    "--checkpoint.save=/shared/save",
)


@pytest.fixture
def launch_file(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "launch.yaml").write_text(text)
        return tmp_path / "launch.yaml"

    return write


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_fit_a_run(path: Path) -> None:
    launch = read_launch_config(path, ["--working_dir=/shared"])
    check_run(launch, parse_run_config(RUN))
    assert launch.world_size == launch.nodes.num_nodes * 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("log_dir: logs\nnodes: {num_node: 2}", "did you mean nodes.num_nodes?"),
        ("log_dirs: logs", "did you mean log_dir?"),
        ("nodes: {num_nodes: 2}", "log_dir"),
        ("log_dir: logs\nnodes: {num_nodes: two}", "num_nodes"),
        ("log_dir: logs\nnodes: {num_nodes: 0}", "nodes.num_nodes is 0: it must be at least 1"),
        ("log_dir: logs\nnodes: {processes_per_node: 9}", "more than nodes.gpus_per_node"),
        ("log_dir: logs\nslurm: {time: tomorrow}", "slurm.time is 'tomorrow'"),
        ("log_dir: logs\nslurm: {time: 90}", "slurm.time is 90: it must be text: write '90'"),
        ("log_dir: logs\nslurm: {time: '4:59'}", "signal_seconds is 300, but slurm.time 4:59 is 299 seconds"),
        ("log_dir: logs\nslurm: {time: 0-01, signal_seconds: 3600}", "slurm.time 0-01 is 3600 seconds"),
        ("log_dir: logs\nslurm: {options: ['--nodes=4']}", "set nodes.num_nodes instead"),
        ("log_dir: logs\nslurm: {options: ['-t 90']}", "set slurm.time instead"),
        (
            "log_dir: logs\nsetup: module load cuda",
            "setup is 'module load cuda': it must be a list: write [module load cuda]",
        ),
        ("log_dir: logs\nenvironment: [A]", "environment is ['A']: it must be a mapping: write {NAME: …}"),
        ("", "launch.yaml is empty"),
        ("- log_dir", "launch.yaml is a list"),
        ("log_dir: logs\nslrum: {}", "did you mean slurm?"),
        ("log_dir: logs\nslurm: {partitoin: {}}", "did you mean slurm.partition?"),
        ("log_dir: logs\nslurm: {max_lives: 0}", "slurm.max_lives is 0: it must be at least 1"),
        ("log_dir: logs\nslurm: {options: [qos=long]}", "start with -"),
        ('log_dir: logs\nslurm: {options: ["--qos=a\\n--wrap=b"]}', "line break"),
        ("log_dir: logs\nenvironment: {A B: c}", "not a valid variable name"),
        ("log_dir: logs\nenvironment: {PATH: '/x:$PATH'}", 'as a line of setup: export PATH="/x:$PATH"'),
        ("log_dir: logs\nenvironment: {HF_HOME: ~/hf}", "environment.HF_HOME is '~/hf', but values are not expanded"),
        ("log_dir: logs\nworking_dir: ~", "working_dir is '~': write ~/ for the home folder, or null for none"),
        ("log_dir: $SCRATCH/logs", "log_dir is '$SCRATCH/logs': variables such as $SCRATCH are not replaced"),
        ("log_dir: logs\nslurm: {options: [--chdir=~/x]}", "sbatch does not expand ~"),
        ("log_dir: logs\nslurm: {job_name: a/b}", "it must be a name without /"),
        ("log_dir: logs\nnodes: {cpus_per_node: 0}", "nodes.cpus_per_node is 0: it must be at least 1"),
        (
            "log_dir: logs\nprocesses_per_node: 2",
            "processes_per_node does not exist: did you mean nodes.processes_per_",
        ),
        ("log_dir: logs\nlog_dir: more", "launch.yaml, line 2: 'log_dir' is given twice, first in line 1"),
        ("log_dir: logs\nenvironment: {A: .nan}", "environment.A is nan: it must be text: write 'nan'"),
        ("log_dir: logs\nrendezvous_port: 80", "rendezvous_port is 80: it must be at least 1024"),
        ("log_dir: logs\ncontainer_mounts: [/shared]", "host:container"),
    ],
)
def test_a_bad_launch_file_is_refused_in_one_line(text: str, message: str, launch_file) -> None:
    with pytest.raises(ConfigError) as raised:
        read_launch_config(launch_file(text))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (("--checkpoint.save=null",), "checkpoint.save is not set"),
        (("--training.global_batch_size=100",), "not a multiple of micro_batch_size"),
        (("--parallel.tensor_model_parallel_size=3",), "16 ranks cannot be divided"),
        (("--checkpoint.save=/tmp/save",), "checkpoint.save is /tmp/save, but each node has its own /tmp: "),
        (("--data.train=[{prefix: /dev/shm/text}]",), "/dev/shm/text, but each node has its own /dev/shm: "),
    ],
)
def test_a_launch_file_that_contradicts_the_run_is_refused(run: tuple[str, ...], message: str, launch_file) -> None:
    launch = read_launch_config(launch_file("log_dir: /shared/logs\nworking_dir: /shared\nnodes: {num_nodes: 2}"))
    with pytest.raises(ConfigError, match=message):
        check_run(launch, parse_run_config([*RUN, *run]))


@pytest.mark.parametrize("mount", ["/lustre/me:/data", "/lustre/me:/data:rw"])
def test_paths_that_the_job_reads_have_the_same_name_in_the_container(mount: str, launch_file) -> None:
    """The job looks up its progress in checkpoint.save outside of the container."""
    text = f"log_dir: /lustre/me/logs\ncontainer_image: image.sqsh\ncontainer_mounts: [/lustre/me:/lustre/me/, {mount}]"
    launch = read_launch_config(launch_file(text))
    check_run(launch, parse_run_config([*RUN, "--checkpoint.save=/lustre/me/runs", "--model.checkpoint=/data/model"]))
    with pytest.raises(
        ConfigError, match=r"checkpoint.save is /data/runs, which .* from /lustre/me, .*/lustre/me:/lustre/me"
    ):
        check_run(launch, parse_run_config([*RUN, "--checkpoint.save=/data/runs"]))


def test_the_runs_own_file_is_named_by_its_absolute_path(launch_file, tmp_path: Path, monkeypatch) -> None:
    """The job may run in another folder than the one it is submitted from, and all nodes must see the file."""
    launch = launch_file("log_dir: /shared/logs\nworking_dir: /shared\nnodes: {num_nodes: 2}")
    (tmp_path / "run.yaml").write_text("model: {checkpoint: /shared/model}")
    with pytest.raises(ConfigError, match=r"--config run.yaml is /tmp/.*run.yaml, but each node has its own /tmp: "):
        monkeypatch.chdir(tmp_path)
        check_run(read_launch_config(launch), parse_run_config(RUN), ["--config", "run.yaml", *RUN])
    assert with_absolute_configs(["--config=a.yaml", "--config", "/b.yaml", "--x", "a.yaml"]) == [
        *("--config", f"{tmp_path}/a.yaml", "--config", "/b.yaml", "--x", "a.yaml")
    ]


def test_missing_inputs_are_listed(launch_file, tmp_path: Path) -> None:
    launch = read_launch_config(launch_file(f"log_dir: logs\nworking_dir: {tmp_path}"))
    run = parse_run_config([*RUN, "--model.checkpoint=model", "--data.train=[{prefix: text}]"])
    assert [*not_there(launch, run)] == ["model.checkpoint model", "data.train text"]
    (tmp_path / "model").mkdir()
    (tmp_path / "text.idx").touch()
    assert not [*not_there(launch, run)]


def test_one_node_may_keep_its_own_files(launch_file) -> None:
    launch = read_launch_config(launch_file("log_dir: /tmp/logs"))
    check_run(launch, parse_run_config([*RUN, "--checkpoint.save=/tmp/save"]))


def tool(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/launch_slurm.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment or None)


def test_a_missing_scheduler_is_reported(launch_file) -> None:
    launch = launch_file("log_dir: /shared/logs\nworking_dir: /shared\n")
    done = tool("--launch", launch, *RUN, "--submit", PATH="")
    assert (
        done.returncode == 2
        and "--submit: sbatch is not installed here" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert tool("--launch", launch, *RUN, PATH="").stdout == done.stdout != ""


def test_a_missing_launch_file_is_refused() -> None:
    done = tool("--launch", "nowhere.yaml", *RUN)
    assert (done.returncode, done.stderr) == (2, "error: nowhere.yaml does not exist\n")


def test_home_paths_are_the_submitters(launch_file, tmp_path: Path) -> None:
    """The job may run with another home folder, or none."""
    launch = launch_file("log_dir: ~/logs\nworking_dir: ~/\ncontainer_mounts: ['~/a:/a']\ncontainer_image: ~/i.sqsh")
    (tmp_path / "run.yaml").write_text("model: {checkpoint: ~/model}\ncheckpoint: {save: ~/old}")
    done = tool("--launch", launch, "--config=~/run.yaml", *RUN[1:-1], "--checkpoint.save=~/save", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for line in (
        f"cd {tmp_path} || exit 1",
        f"LOG_DIR={tmp_path}/logs",
        f"SAVE={tmp_path}/save",
        f"CONTAINER=(--container-image={tmp_path}/i.sqsh",
        f"--container-mounts={tmp_path}/a:/a",
        f"--config {tmp_path}/run.yaml",
        f"--model.checkpoint={tmp_path}/model --checkpoint.save={tmp_path}/save &",
    ):
        assert line in done.stdout


def test_by_hand_excludes_submit(launch_file) -> None:
    done = tool("--launch", launch_file("log_dir: /shared/logs"), *RUN, "--by_hand", "n1", "--submit")
    assert done.returncode == 2 and "give only one of them" in done.stderr and not done.stdout


def test_by_hand_prints_the_commands_of_a_node(launch_file) -> None:
    more = "environment: {NCCL_DEBUG: a b, OMP_NUM_THREADS: 4}\nsetup: [module load cuda]\n"
    launch = launch_file("log_dir: /shared/logs\nworking_dir: /shared\nnodes: {num_nodes: 2}\n" + more)
    done = tool("--launch", launch, *RUN, "--by_hand", "node7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cd /shared\nexport CUDA_DEVICE_MAX_CONNECTIONS=1\n")
    assert "export NCCL_DEBUG='a b'\nmodule load cuda\ntorchrun " in done.stdout
    assert "export OMP_NUM_THREADS=4\n" in done.stdout
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node7:29400" in done.stdout
    assert done.stdout.endswith(f"-m megatron_llamapro.pretrain {shlex.join(RUN)}\n")
