"""docs/instruct.md: its commands and its recipe, run on a tiny model as they stand but for names and sizes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.expansion.inits import Expansion

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "llama2_7b_pro_instruct" / "run.yaml"
PAGE = (ROOT / "docs" / "instruct.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
[EXAMPLE] = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.strip().splitlines()]
POST_PRETRAINED = (
    *("--model.checkpoint=llama-2-7b-pro", "--model.trainable=[added_blocks]", "--training.exit_interval=2"),
    "--checkpoint.save=runs/llama2_7b_pro",
)
TINY = (
    *("--nproc-per-node", "2", "-m", "megatron_llamapro.pretrain", "--config", str(RECIPE)),
    *("--data.seq_length=128", "--training.train_iters=4", "--training.global_batch_size=4"),
    *("--training.precision=fp32", "--optimizer.lr=1e-2", "--checkpoint.async_save=false"),
)


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """Where the page's commands run."""
    shutil.copytree(tiny_llama(num_hidden_layers=4), tmp_path / "llama-2-7b-hf")
    hf_to_megatron(tmp_path / "llama-2-7b-hf", tmp_path / "llama-2-7b-pro", expansion=Expansion.at(2, 5))
    (tmp_path / "chat.jsonl").write_text((json.dumps(EXAMPLE) + "\n") * 8)
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: str, folder: Path, *more: str) -> str:
    program, *arguments = shlex.split(command)
    here = Path(sys.executable)
    path = {"python": str(here), "torchrun": str(here.with_name("torchrun"))}.get(program, program)
    if program == "torchrun":
        arguments = ["--standalone", *TINY, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([path, *arguments], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    preprocess, train, export, copy = COMMANDS
    assert train.endswith(f"--config {RECIPE.relative_to(ROOT)}")
    assert "8 conversations" in run(preprocess, folder)
    run(train, folder, *POST_PRETRAINED)
    assert "one pass is 8 samples" in run(train, folder)
    records = (folder / "runs/llama2_7b_pro_instruct/metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, records) if record["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    run(export, folder)
    run(copy, folder)
    result = folder / "llama-2-7b-pro-instruct-hf"
    template = (ROOT / "examples/llama2_7b_pro_instruct/chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert tokenizer.apply_chat_template(EXAMPLE["messages"], tokenize=False) == AutoTokenizer.from_pretrained(
        folder / "llama-2-7b-hf"
    ).apply_chat_template(EXAMPLE["messages"], chat_template=template, tokenize=False)
    assert AutoModelForCausalLM.from_pretrained(result).config.num_hidden_layers == 6


def test_the_recipe_is_the_papers() -> None:
    config = parse_run_config(["--config", str(RECIPE)])
    assert config.model.trainable == ("everything",) and config.data.format == "chat"
    assert (config.training.global_batch_size, config.data.seq_length) == (128, 4096)
    assert (config.optimizer.lr, config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == (
        2e-5,
        "cosine",
        0.03,
    )
