"""The basis of the function line of `verify`: transformers' own forward pass, streamed, compared with ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron
from megatron_llamapro.checkpoint.formats.open import OpenTensors, open_checkpoint
from megatron_llamapro.checkpoint.proof.same_function import CastTensors
from megatron_llamapro.checkpoint.proof.transformers_model import TheirModel, their_model
from megatron_llamapro.checkpoint.proof.verify import Check, verify
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, nothing
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.families import hf_config as families
from megatron_llamapro.families.rotary import Rope
from megatron_llamapro.families.shape import RopeScaling
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES, make_tiny_model

Tiny = Callable[..., Path]

TOKENS = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(1))
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def streamed(folder: Path, tokens: torch.Tensor = TOKENS) -> TheirModel:
    with SourceFiles() as files:
        model = OpenTensors(open_checkpoint(folder), files)
        return their_model(model.checkpoint.config, model, tokens)


@pytest.mark.parametrize("settings", [*TINY_FAMILIES.values(), {"rope_parameters": LINEAR}], ids=str)
def test_the_streamed_pass_equals_transformers(settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    folder = tiny_model(**settings)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
    hf_to_megatron(folder, tmp_path / "megatron")
    for stored in (folder, tmp_path / "megatron"):
        found = streamed(stored)
        torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.frequencies, whole.model.rotary_emb.inv_freq)


MEMORY = """
import resource, sys
from pathlib import Path
import test_same_function

def peak(folder):
    test_same_function.streamed(Path(folder))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(-peak(sys.argv[1]) + peak(sys.argv[2]))  # the first sets up what is set up once
"""


def test_the_streamed_pass_holds_no_more_than_a_linear(tiny_model: Tiny, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "large", hidden_size=256, intermediate_size=2048, num_hidden_layers=16)
    num_bytes = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tiny_model()), str(tmp_path / "large")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    grown = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert num_bytes > 100e6 > 5 * grown


def function_line(folder: Path, **settings: Any) -> Check:
    """Return the function line of `verify` for an expansion of this model."""
    expand_hf(folder, folder.parent / "expanded", expansion=Expansion.at(2, 5))
    return {check.name: check for check in verify(folder, folder.parent / "expanded", **settings)}["function"]


def with_fields(source: Path, folder: Path, fields: Mapping) -> Path:
    """Copy a model with other fields in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def newer_wins(config: Mapping, *, default_base: float) -> Rope:
    """Read as an earlier version did: rope_parameters, regardless of rope_scaling."""
    rope = {**(config.get("rope_scaling") or {}), **config["rope_parameters"]}
    scaling = RopeScaling("linear", rope["factor"]) if rope["rope_type"] == "linear" else None
    return Rope(rope.get("rope_theta") or default_base, scaling)


# Wrong readings: the function that each replaces, itself, a configuration that it misreads, the line of `verify`.
MISREAD: dict[str, tuple[str, Callable, dict, str]] = {
    "a spelling that transformers replaces": (
        "read_rope",
        newer_wins,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": {"type": "linear", "factor": 4},
        },
        "reads other rotary embeddings from .*/config.json",
    ),
    "a base of null": (
        "read_rope",
        newer_wins,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": None}},
        "fails on config.json: ",
    ),
    "a window that is not seen": (
        "_windows",
        lambda *args, **settings: {},
        {"model_type": "mistral", "sliding_window": 4096},
        "differ from them by up to [0-9.]+: it reads config.json differently",
    ),
    "an epsilon that is not seen": (
        "number",
        lambda config, name, default=None, **settings: 1e-6,
        {"rms_norm_eps": 0.1},
        "differ from them by up to",
    ),
}


@pytest.mark.parametrize(("name", "wrong", "fields", "message"), MISREAD.values(), ids=MISREAD.keys())
@pytest.mark.filterwarnings("ignore")
def test_a_misread_configuration_fails_the_function_line(
    name: str,
    wrong: Callable,
    fields: dict,
    message: str,
    tiny_model: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our own pass reads both sides alike and finds them equal, so comparing it with itself misses the error."""
    monkeypatch.setattr(families, name, wrong)
    monkeypatch.setattr("megatron_llamapro.checkpoint.convert.spelled_for_all", dict)
    line = function_line(with_fields(tiny_model(), tmp_path / "source", fields))
    assert not line.ok
    assert line.text.startswith("by this program's reading logits are equal, bit for bit, on 32 random tokens, but ")
    assert re.search(message, line.text), line.text


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_a_default_window_is_shortened_for_the_proof(model_type: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """The family's default is transformers' default. Without a default window, every token stays in view."""
    switch = {"use_sliding_window": True} if "qwen" in model_type else {}
    source = with_fields(tiny_model(model_type=model_type), tmp_path / "source", {})
    path = source / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "sliding_window"} | switch
    path.write_text(json.dumps(config))
    default = getattr(AutoConfig.for_model(model_type, **switch), "sliding_window", None)
    with SourceFiles() as files:
        tensors = CastTensors(open_checkpoint(source), files, ("float32",), nothing)
        assert tensors.config == config | ({"sliding_window": 8} if default else {})
        found = their_model(tensors.config, tensors, TOKENS).logits
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(source)(TOKENS, use_cache=False).logits
    assert default or torch.allclose(found, whole, rtol=1e-5, atol=1e-5)


def test_without_transformers_it_says_what_is_unproven(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = function_line(with_fields(tiny_model(), tmp_path / "source", {}))
    assert line.ok
    assert "not that config.json is read correctly: install transformers 4.56 or newer" in line.text


def test_code_named_in_the_configuration_is_not_loaded(tiny_model: Tiny) -> None:
    names = {
        "auto_map": {"AutoConfig": "nobody/nothing--code.Config", "AutoModelForCausalLM": "code.Model"},
        "attn_implementation": "nobody/nothing",
        "_attn_implementation": "nobody/nothing",
        "experts_implementation": "nobody/nothing",
    }
    with SourceFiles() as files:
        model = OpenTensors(open_checkpoint(tiny_model()), files)
        config = model.checkpoint.config
        found = their_model({**config, **names}, model, TOKENS)
        assert torch.equal(found.logits, their_model(config, model, TOKENS).logits)


def test_an_error_of_transformers_is_one_line(tiny_model: Tiny, tmp_path: Path) -> None:
    with SourceFiles() as files:
        model = OpenTensors(open_checkpoint(tiny_model()), files)
        config = model.checkpoint.config
        with pytest.raises(CheckpointError, match=r"transformers [0-9.]+ fails on config.json: ") as failure:
            their_model({**config, "hidden_act": "nonsense"}, model, TOKENS)
        assert "\n" not in str(failure.value)
        with pytest.raises(
            CheckpointError, match=r"needs the tensor .*q_proj.bias, which the checkpoint does not have"
        ):
            their_model({**config, "attention_bias": True}, model, TOKENS)
        with pytest.raises(CheckpointError, match=r"q_proj.weight of shape \[128, 64\], not \[64, 64\]"):
            their_model({**config, "head_dim": 32}, model, TOKENS)
