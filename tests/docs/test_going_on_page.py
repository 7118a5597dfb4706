"""docs/going_on.md: its configuration and its commands, run on a tiny model as they stand but for names and sizes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import yaml

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.verify import verify
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.expansion.inits import Expansion

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "going_on.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
[CONFIGURATION] = [text for kind, text in BLOCKS if kind == "yaml"]
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.strip().splitlines()]


def tiny(text: str, folder: Path) -> dict:
    """The page's configuration for a tiny model, its paths below `folder`."""
    config = yaml.safe_load(text)
    config["data"]["seq_length"] = 32
    config["training"] = {"train_iters": 4, "micro_batch_size": 1, "global_batch_size": 4, "eval_interval": 2}
    config["training"]["precision"] = "fp32"
    config["optimizer"] = {"lr": 1e-2, "lr_warmup_fraction": 0.0}
    return json.loads(re.sub(r'"((?:data|runs)/|llama-2)', lambda m: f'"{folder}/{m[1]}', json.dumps(config)))


def run(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(re.sub(r" (runs/|mixed\.yaml|llama-2)", rf" {folder}/\1", command))
    here = Path(sys.executable)
    if program == "torchrun":
        arguments = ["--standalone", "--nproc-per-node", "1", *arguments[2:]]
    path = {"python": here, "torchrun": here.with_name("torchrun")}[program]
    done = subprocess.run(
        [path, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_inputs(source: Path, folder: Path) -> None:
    hf_to_megatron(source, folder / "llama-2-7b-pro", expansion=Expansion.at(2, 5))
    (folder / "data").mkdir()
    texts = [text[:2000] for text in topics.values()]
    names = ("new-domain", "general", "new-domain.held-out", "general.held-out")
    for number, name in enumerate(names):
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::4]))
        options = f"--input {folder}/text.jsonl --tokenizer {source} --output_prefix {folder}/data/{name}"
        run(f"python tools/preprocess_data.py {options}", folder)


def test_the_page(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_llama(num_hidden_layers=4)
    make_inputs(source, tmp_path)
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(tiny(CONFIGURATION, tmp_path)))
    train, plot, expand, look, train_again, check, export = COMMANDS
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


def test_the_weights_are_shares() -> None:
    config = yaml.safe_load(CONFIGURATION)
    arguments = [f"--{section}={json.dumps(values)}" for section, values in config.items()]
    parsed = parse_run_config(arguments)
    assert [entry.weight for entry in parsed.data.train] == [0.9, 0.1]
