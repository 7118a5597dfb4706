"""docs/replay.md: its commands and its configuration, run on a tiny model with only sizes changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from pages import blocks, commands, run

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.expansion.round import Expansion

PAGE = "docs/replay.md"
TINY = {
    "training": {"train_iters": 2, "micro_batch_size": 1, "global_batch_size": 4, "precision": "fp32"},
    "optimizer": {"lr": 1e-2, "lr_warmup_fraction": 0.0},
}


def test_the_pages_commands_train_on_generated_text(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_llama(num_hidden_layers=4)
    (tmp_path / "llama-2-7b-hf").symlink_to(source)
    (tmp_path / "data").mkdir()
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in topics.values()))
    preprocess([tmp_path / "new.jsonl"], tmp_path / "data" / "new-domain", tokenizer=source)
    hf_to_megatron(source, tmp_path / "llama-2-7b-pro", expansion=Expansion.at(2, 5))
    [configuration] = map(yaml.safe_load, blocks(PAGE, "yaml"))
    data = {**configuration["data"], "seq_length": 32}
    (tmp_path / "replay.yaml").write_text(yaml.safe_dump({**configuration, **TINY, "data": data}))
    install, generate, tokenize, train = commands(PAGE)
    assert install == "pip install -e .[replay]"
    said = run(generate.replace("20000000", "2000"), tmp_path, "--max_document_tokens", "100")
    assert "they start with '<s>' and end with '</s>'" in said
    run(tokenize.replace("16", "1"), tmp_path)
    run(train, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if record["kind"] == "train"] == [1, 2]
