"""docs/instruct.md: its commands and its recipe, run on a tiny model with only names and sizes changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, blocks, commands, run, workplace

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.expansion.round import Expansion

RECIPE = ROOT / "examples" / "llama2_7b_pro_instruct" / "run.yaml"
PAGE = "docs/instruct.md"
[EXAMPLE] = map(json.loads, blocks(PAGE, "json"))
POST_PRETRAINED = (
    *("--model.checkpoint=llama-2-7b-pro", "--model.trainable=[added_blocks]", "--training.exit_interval=2"),
    "--checkpoint.save=runs/llama2_7b_pro",
)
TINY = (
    *("--data.seq_length=128", "--training.train_iters=4", "--training.global_batch_size=4"),
    *("--training.precision=fp32", "--optimizer.lr=1e-2", "--checkpoint.async_save=false"),
)


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a folder where the page's commands run."""
    shutil.copytree(tiny_llama(num_hidden_layers=4), tmp_path / "llama-2-7b-hf")
    hf_to_megatron(tmp_path / "llama-2-7b-hf", tmp_path / "llama-2-7b-pro", expansion=Expansion.at(2, 5))
    (tmp_path / "chat.jsonl").write_text((json.dumps(EXAMPLE) + "\n") * 8)
    return workplace(tmp_path)


def test_the_pages_commands_train_and_export_an_instruct_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    preprocess, train, export, copy = commands(PAGE)
    assert train.endswith(f"--config {RECIPE.relative_to(ROOT)}")
    assert "8 conversations" in run(preprocess, folder)
    run(train, folder, *TINY, *POST_PRETRAINED, num_ranks=2)
    assert "one pass is 8 samples" in run(train, folder, *TINY, num_ranks=2)
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


def test_the_recipe_matches_the_paper() -> None:
    config = parse_run_config(["--config", str(RECIPE)])
    assert config.model.trainable == ("everything",) and config.data.format == "chat"
    assert (config.training.global_batch_size, config.data.seq_length) == (128, 4096)
    assert (config.optimizer.lr, config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == (
        2e-5,
        "cosine",
        0.03,
    )
