"""YAML, overrides, and what a user sees when one is wrong."""

from pathlib import Path

import pytest

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.io import dump_yaml, parse_run_config

MINIMAL = """
model: {checkpoint: somewhere}
data: {train: [{prefix: a, weight: 2}, {prefix: b}], seq_length: 128, valid: {cpp: c}}
training: {train_iters: 3, micro_batch_size: 1, global_batch_size: 4}
optimizer: {lr: 1e-4}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def parsed(run_yaml: Path, *overrides: str):
    return parse_run_config(["--config", str(run_yaml), *overrides])


def test_yaml_and_overrides(run_yaml: Path) -> None:
    config = parsed(run_yaml, "--parallel.tensor_model_parallel_size", "2", "--training.precision=fp32")
    assert config.optimizer.lr == 1e-4  # plain PyYAML reads 1e-4 as text
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.training.precision == "fp32"
    assert [(entry.prefix, entry.weight) for entry in config.data.train] == [("a", 2.0), ("b", 1.0)]
    assert config.data.valid == {"cpp": "c"}


def test_steps_to_leave_out_are_numbers_and_ranges(run_yaml: Path) -> None:
    run_yaml.write_text(MINIMAL.replace("train_iters: 3", "train_iters: 20, skip_iterations: [7, 12-15]"))
    assert parsed(run_yaml).training.skip_iterations == (7, "12-15")
    assert parsed(run_yaml, "--training.skip_iterations", "[3, 4-5]").training.skip_iterations == (3, "4-5")


def test_resolved_config_reads_back_equal(run_yaml: Path, tmp_path: Path) -> None:
    config = parsed(
        run_yaml,
        "--parallel.pipeline_model_parallel_size=2",
        "--parallel.pipeline_stage_layers=[3,2]",
        "--training.skip_iterations=[1,2-3]",
        '--optimizer.param_groups=[{"match": "*.linear_fc2.weight", "lr_mult": 0.5}]',
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert parsed(resolved) == config


WRONG = {
    "misspelt key": (MINIMAL.replace("seq_length", "seq_lenght"), "did you mean 'seq_length'?"),
    "wrong type": (MINIMAL.replace("train_iters: 3", "train_iters: three"), "training.train_iters"),
    "missing field": (MINIMAL.replace("model: {checkpoint: somewhere}", ""), "model.checkpoint"),
    "unknown precision": (MINIMAL.replace("global_batch", "precision: fp8, global_batch"), "fp8"),
    "not yaml": ("model: [", ""),
    "zero weight": (MINIMAL.replace("weight: 2", "weight: 0"), "weights are above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_yaml_is_one_line(case: str, tmp_path: Path) -> None:
    text, expected = WRONG[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        parsed(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_misspelt_option(run_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        parse_run_config(["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="did you mean 'tensor_model_parallel_size'"):
        parsed(run_yaml, "--parallel.tensor_model_parallel_siz", "2")


def test_print_config(run_yaml: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(run_yaml, "--print_config")
    assert end.value.code == 0
    assert "tensor_model_parallel_size: 1" in capsys.readouterr().out
