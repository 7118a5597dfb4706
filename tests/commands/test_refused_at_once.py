"""A bad configuration or path is refused before torch is imported, because that takes seconds. Importing torch is an
error in these tests. Also the messages about packages that are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatron_llamapro.config.io import dump_yaml

ROOT = Path(__file__).parents[2]
PRETRAIN = "-m megatron_llamapro.pretrain --config {run} "
LLAMAPRO = "-m megatron_llamapro "
# The words typed and the error expected. {run} is a valid configuration, {model} a Hugging Face model.
REFUSED = {
    PRETRAIN + "--training.train_iters 0": "training.train_iters is 0",
    PRETRAIN + "--model.checkpoint nowhere": "nowhere is not a folder",
    PRETRAIN + '--data.train [{{"prefix":"nowhere"}}]': "nowhere.bin does not exist",
    PRETRAIN + "--data.valid.x nowhere": "nowhere.bin does not exist",
    PRETRAIN + "--data.tokenizer nowhere": "nowhere does not exist: give a tokenizer file",
    PRETRAIN + "--data.seq_length 4096": "data.seq_length is 4096, but the model supports at most",
    PRETRAIN + "--training.precision bf16": "holds float32 weights",
    PRETRAIN + "--parallel.tensor_model_parallel_size 2": "1 rank cannot be divided",
    "-m megatron_llamapro.pretrain --config nowhere.yaml": "nowhere.yaml",
    LLAMAPRO + "train --config {run} --training.train_iters 0": "training.train_iters is 0",
    LLAMAPRO + "preprocess --input nowhere --tokenizer {model} --output_prefix x": "nowhere does not exist",
    LLAMAPRO + "preprocess --input {run} --tokenizer nowhere --output_prefix x": "nowhere does not exist",
    LLAMAPRO + "train-tokenizer --input nowhere --vocab_size 300 --output_dir x": "nowhere does not exist",
    LLAMAPRO + "generate-text --model nowhere --output x --num_documents 1": "nowhere is not a folder",
    LLAMAPRO + "generate-text --model {model} --output x": "give either --num_documents or --num_tokens",
    LLAMAPRO + "generate-text --model {model} --output x --num_tokens 9": "must be below the 128 positions",
    LLAMAPRO
    + "generate-text --model {model} --output x --num_tokens 9 --max_document_tokens 9 --eod_token y": "no token 'y'",
    LLAMAPRO + "convert hf-to-megatron --source nowhere --target x": "nowhere is not a folder",
    LLAMAPRO + "convert hf-to-megatron --source {model} --target {model}": "overlap",
    LLAMAPRO + "convert hf-to-megatron --source {model} --target x --num_added_blocks 99": "99",
    LLAMAPRO + "expand --source nowhere --target x --num_added_blocks 1": "nowhere is not a folder",
    LLAMAPRO + "verify --original nowhere --expanded nowhere": "nowhere is not a folder",
    LLAMAPRO + "inspect --checkpoint nowhere": "nowhere is not a folder",
    LLAMAPRO + "dry-run --config {run} --world_size 1 --model.checkpoint nowhere": "nowhere does not exist",
    LLAMAPRO + "dry-run --config {run} --world_size 3": "is not a multiple of",
    LLAMAPRO + "plan-parallelism --config {run} --world_size 1 --model.checkpoint nowhere": "nowhere does not exist",
    LLAMAPRO + "plan-pipeline --config {run} --world_size 1": "there is one stage",
    LLAMAPRO
    + "plan-pipeline --config {run} --world_size 1 --calibrate x --model.checkpoint nowhere": "nowhere does not exist",
    LLAMAPRO + "launch --config {run} --launch nowhere": "nowhere does not exist",
    LLAMAPRO + "plot --input nowhere --output x.png": "nowhere does not exist",
}


@pytest.fixture
def run_yaml(run_config: Callable, tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(dump_yaml(run_config()))
    return tmp_path / "run.yaml"


def run_typed(
    command: str, *, options: list[str] | None = None, variables: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Return exit code and output of a command of this repository."""
    done = subprocess.run(
        [sys.executable, *(options or []), *command.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "first" / "torch").mkdir(parents=True)
    (tmp_path / "first" / "torch" / "__init__.py").write_text("raise RuntimeError('torch is imported')\n")
    return {"PYTHONPATH": str(tmp_path / "first")}


@pytest.mark.parametrize("command", REFUSED)
def test_it_is_refused_before_torch_is_imported(
    command: str, run_yaml: Path, without_torch: dict, models: Callable
) -> None:
    line = command.format(run=run_yaml, model=models().original_hf)
    code, out, errors = run_typed(line, variables=without_torch)
    assert (code, out) == (2, ""), errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert REFUSED[command] in errors


def test_each_rank_refuses_on_its_own(run_yaml: Path, without_torch: dict) -> None:
    """All ranks find the same error; the first rank of each node prints it."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    command = PRETRAIN.format(run=run_yaml) + "--parallel.tensor_model_parallel_size 4"
    assert run_typed(command, variables={**without_torch, **place}) == (2, "", "")
    code, _, errors = run_typed(command, variables={**without_torch, **place, "LOCAL_RANK": "0"})
    assert code == 2 and errors.startswith("error: 2 ranks cannot be divided") and errors.count("\n") == 1


def test_a_valid_run_imports_torch(run_yaml: Path, without_torch: dict) -> None:
    assert "torch is imported" in run_typed(PRETRAIN.format(run=run_yaml), variables=without_torch)[2]


@pytest.fixture(scope="module")
def packages_but_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of everything installed here except torch."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("torch", "__editable__")):
            (folder / path.name).symlink_to(path)
    return folder


def test_a_missing_torch_is_reported(run_yaml: Path, packages_but_torch: Path) -> None:
    variables = {"PYTHONPATH": str(packages_but_torch)}
    code, out, errors = run_typed(PRETRAIN.format(run=run_yaml), options=["-S"], variables=variables)
    assert (code, out, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith(f"error: the module torch is not installed in this Python ({sys.executable}): ")
