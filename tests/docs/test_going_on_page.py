"""docs/going_on.md: its configuration and its commands, run on a tiny model with only names and sizes changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from pages import blocks, commands, run, workplace

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.expansion.round import Expansion

PAGE = "docs/going_on.md"
[CONFIGURATION] = map(yaml.safe_load, blocks(PAGE, "yaml"))
TINY = {
    "training": {
        "train_iters": 4,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "eval_interval": 2,
        "precision": "fp32",
    },
    "optimizer": {"lr": 1e-2, "lr_warmup_fraction": 0.0},
}


def make_inputs(source: Path, folder: Path) -> None:
    hf_to_megatron(source, folder / "llama-2-7b-pro", expansion=Expansion.at(2, 5))
    (folder / "data").mkdir()
    texts = [text[:2000] for text in topics.values()]
    names = ("new-domain", "general", "new-domain.held-out", "general.held-out")
    for number, name in enumerate(names):
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::4]))
        preprocess([folder / "text.jsonl"], folder / "data" / name, tokenizer=source)


def test_the_pages_commands_give_two_rounds_that_verify(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_llama(num_hidden_layers=4)
    make_inputs(source, workplace(tmp_path))
    data = {**CONFIGURATION["data"], "seq_length": 32}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump({**CONFIGURATION, **TINY, "data": data}))
    train, plot, expand, look, train_again, check, export, expand_tuned, check_tuned = commands(PAGE)
    run(train, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert {record["name"] for record in records if record["kind"] == "eval"} == {"new", "general"}
    run(plot, tmp_path)
    run(expand.replace("--num_added_blocks 8", "--num_added_blocks 3"), tmp_path)
    assert "2 added in round 2" in run(look, tmp_path)
    run(train_again, tmp_path)
    assert "added blocks" in run(check, tmp_path)
    run(export, tmp_path)
    result = inspect(tmp_path / "llama-2-7b-pro-2-hf")
    assert result.plan.num_layers == 9 and result.plan.num_rounds == 2
    checks = {claim.name: claim for claim in verify(tmp_path / "runs/first", tmp_path / "runs/second")}
    assert all(claim.ok for claim in checks.values()) and "trained" in checks["added blocks"].text
    assert all(claim.ok for claim in verify(source, tmp_path / "llama-2-7b-pro-2-hf", quick=True))
    tune(tmp_path / "llama-2-7b-pro-2-hf", tmp_path / "llama-2-7b-pro-tuned")
    run(expand_tuned.replace("--num_added_blocks 8", "--num_added_blocks 3"), tmp_path)
    said = run(check_tuned, tmp_path)
    assert "FAIL" not in said and "its hashes are of float32 tensors" in said
    moved = {claim.name: claim for claim in verify(source, tmp_path / "llama-2-7b-pro-3", quick=True)}
    assert not moved["original tensors"].ok and moved["manifest"].ok


def tune(source: Path, target: Path) -> None:
    """Train every weight in bfloat16, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(target)


def test_the_pages_blend_weights_are_shares() -> None:
    arguments = [f"--{section}={json.dumps(values)}" for section, values in CONFIGURATION.items()]
    parsed = parse_run_config(arguments)
    assert [entry.weight for entry in parsed.data.train] == [0.9, 0.1]
