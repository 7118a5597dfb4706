"""`~` is the home folder in every path, and never the name of a folder. Also sizes as a terminal shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.__main__ import COMMANDS
from megatron_llamapro.config.io import options_with_homes, parse_run_config
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import decimal_size, expand_user

RUN = """
model: {checkpoint: ~/model}
data: {train: [{prefix: ~/a}, {prefix: /b}], seq_length: 8, valid: {cpp: ~/c}, tokenizer: ~/t, cache_dir: ~/cache}
training: {train_iters: 1, micro_batch_size: 1, global_batch_size: 8}
checkpoint: {save: ~/save}
logging: {metrics_file: ~/m.jsonl, tensorboard_dir: ~/tb}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the home folder, with the working directory elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_every_path_of_a_run_expands_the_home(home: Path) -> None:
    (home / "run.yaml").write_text(RUN)
    config = parse_run_config(["--config=~/run.yaml", "--checkpoint.save=~/other", "--data.valid.python", "~"])
    assert config.model.checkpoint == f"{home}/model"
    assert [entry.prefix for entry in config.data.train] == [f"{home}/a", "/b"]
    assert config.data.valid == {"cpp": f"{home}/c", "python": str(home)}
    assert (config.data.tokenizer, config.data.cache_dir) == (f"{home}/t", f"{home}/cache")
    assert config.checkpoint.save == f"{home}/other"
    assert (config.logging.metrics_file, config.logging.tensorboard_dir) == (f"{home}/m.jsonl", f"{home}/tb")


def test_options_carry_the_submitters_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "run.yaml").write_text(RUN)
    arguments = ["--config", f"{home}/run.yaml", "--checkpoint.save=~/other"]
    here, said = parse_run_config(arguments), options_with_homes(RunConfig, arguments)
    monkeypatch.setenv("HOME", "/root-of-a-container")
    assert parse_run_config(arguments) != here == parse_run_config([*arguments, *said])
    assert "--data.tokenizer=" + f"{home}/t" in said and not any("seq_length" in word for word in said)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("~nobody-has-this-name/x", "no home folder is known for ~nobody-has-this-name"),
        ("$HOME/x", "variables such as \\$HOME are not replaced"),
        ("/scratch/${USER}", "variables such as \\${USER} are not replaced"),
        ("a\0b", "control character"),
    ],
)
def test_an_invalid_path_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expand_user(text)


def test_other_paths_are_unchanged(home: Path) -> None:
    for text in ("a~", "./~", "./x/", "a//b", "/x/~/y", "5$ bill", "a b"):
        assert expand_user(text) == text
    assert expand_user(f"~{os.environ.get('USER', 'root')}/x").startswith("/")


# One line for every command; the path that it reads first does not exist.
LINES = {
    "convert hf-to-megatron": ("--source=~/nowhere", "--target=~/x"),
    "expand": ("--source=~/nowhere", "--target=~/x", "--num_added_blocks=1"),
    "inspect": ("--checkpoint=~/nowhere",),
    "verify": ("--original=~/nowhere", "--expanded=~/x"),
    "preprocess": ("--input=~/nowhere", "--tokenizer=~/nowhere", "--output_prefix=~/x"),
    "train-tokenizer": ("--input=~/nowhere", "--vocab_size=300", "--output_dir=~/x"),
    "plot": ("--input=~/nowhere", "--output=~/x.png"),
    "dry-run": ("--config=~/nowhere", "--world_size=1"),
    "plan-pipeline": ("--config=~/nowhere", "--world_size=1"),
    "plan-parallelism": ("--config=~/run.yaml", "--world_size=8", "--hf_config=~/nowhere"),
    "train": ("--config=~/nowhere",),
    "launch": ("--config=~/run.yaml", "--launch=~/nowhere"),
    "average": ("--checkpoint", "~/nowhere", "~/x", "--target=~/y"),
    "extract": ("--source=~/nowhere", "--target=~/x"),
    "compose": ("--base=~/nowhere", "--target=~/x"),
    "generate-text": ("--model=~/nowhere", "--output=~/x.jsonl", "--num_documents=1"),
    "evaluate": ("--checkpoint=~/nowhere", "--set", "a=~/x"),
    "sweep": ("--checkpoint=~/nowhere", "--new", "a=~/x", "--known", "b=~/y"),
    "rank-blocks": ("--checkpoint=~/nowhere", "--known", "a=~/x", "--num_added_blocks=1"),
}


@pytest.mark.parametrize("command", LINES)
def test_every_command_expands_the_home(command: str, home: Path) -> None:
    (home / "run.yaml").write_text(RUN)
    process = [sys.executable, "-m", "megatron_llamapro", *command.split(), *LINES[command]]
    done = subprocess.run(process, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{home}/nowhere" in done.stderr or "~/nowhere does not exist" in done.stderr
    assert not list(Path.cwd().iterdir()) and [path.name for path in home.iterdir()] == ["run.yaml"]


SIZES = {
    0: "0 B",
    999: "999 B",
    1000: "1 kB",
    1_234_567: "1.23 MB",
    999_400_000: "999 MB",
    999_600_000: "1 GB",
    13_500_000_000: "13.5 GB",
    2_000_000_000_000: "2 TB",
}


@pytest.mark.parametrize(("num_bytes", "text"), SIZES.items())
def test_sizes_have_three_digits_and_no_exponent(num_bytes: int, text: str) -> None:
    assert decimal_size(num_bytes) == text


def test_every_command_has_a_line() -> None:
    assert {command.split()[0] for command in LINES} == set(COMMANDS)
