"""How added blocks are initialised: each way is an identity that can be recognised later. A way that cannot learn is
refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.commands.options import check_init
from megatron_llamapro.config.errors import ExpansionError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import ExpansionPlan, Placement
from megatron_llamapro.expansion.round import Expansion, Init
from megatron_llamapro.testing.checkpoints import read_tensors

Tiny = Callable[..., Path]
ZEROED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def block(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    start = f"model.layers.{layer}."
    return {name.removeprefix(start): t for name, t in read_tensors(folder).items() if name.startswith(start)}


@pytest.mark.parametrize("init", list(Init), ids=lambda init: init.value)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_initialisation_is_an_identity(init: Init, dtype: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama(dtype=dtype)
    expand_hf(source, tmp_path / "hf", expansion=Expansion.at(2, 5, init=init))
    hf_to_megatron(source, tmp_path / "megatron", expansion=Expansion.at(2, 5, init=init))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "through")
    assert all(check.ok for check in verify(source, tmp_path / "hf"))
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(tokens).logits
            for folder in (source, tmp_path / "through")
        )
    assert torch.equal(before, after)
    assert Manifest.read(tmp_path / "through").inits == (init.value,)
    one, other = read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "through")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_each_initialisation_has_its_values(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama()
    for init in Init:
        expand_hf(source, tmp_path / init.value, expansion=Expansion.at(2, 5, init=init, seed=3))
    parent, following = block(source, 1), block(source, 2)
    copy, random, mean, zero_norm = (block(tmp_path / init.value, 2) for init in Init)
    for name, tensor in parent.items():
        if name in ZEROED:
            assert not any(x[name].view(torch.int32).any() for x in (copy, random, mean))
            assert torch.equal(zero_norm[name], tensor)
            continue
        assert torch.equal(copy[name], tensor)
        assert torch.equal(mean[name], (tensor + following[name]) / 2)
        if name.endswith("norm.weight"):
            assert torch.equal(random[name], torch.ones_like(tensor))
            assert not zero_norm[name].view(torch.int32).any()
        else:
            assert 0.015 < random[name].std() < 0.025 and random[name].mean().abs() < 0.003
            assert torch.equal(zero_norm[name], tensor)


def test_random_blocks_depend_on_the_seed_alone(tiny_llama: Tiny, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        expand_hf(tiny_llama(), tmp_path / name, expansion=Expansion.at(2, 5, init=Init.RANDOM, seed=seed))
    first, same, other = (block(tmp_path / name, 2)["mlp.up_proj.weight"] for name in "abc")
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first, block(tmp_path / "a", 5)["mlp.up_proj.weight"])


def test_rounds_keep_their_initialisation(tiny_llama: Tiny, tmp_path: Path) -> None:
    expand_hf(tiny_llama(), tmp_path / "1", expansion=Expansion.at(2, 5, init=Init.MEAN))
    expand_hf(tmp_path / "1", tmp_path / "2", expansion=Expansion.at(0, init=Init.RANDOM, seed=9))
    assert Manifest.read(tmp_path / "2").inits == ("mean", "random")
    assert Manifest.read(tmp_path / "2").init_seeds == (None, 9)
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "2"))


def test_zeroed_norms_are_refused_unless_forced() -> None:
    with pytest.raises(ExpansionError, match="init zero_norm cannot learn in a SwiGLU block"):
        check_init(Init.ZERO_NORM, force=False)
    check_init(Init.ZERO_NORM, force=True)
    check_init(Init.COPY, force=False)


def test_zeroed_norms_with_biases_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ExpansionError, match="is not an identity if queries, keys and values have biases"):
        expand_hf(tiny_model(model_type="qwen2"), tmp_path / "it", expansion=Expansion.at(2, 5, init=Init.ZERO_NORM))


def test_the_command_line_chooses_the_initialisation(tiny_llama: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, "tools/expand_checkpoint.py", "--source", str(tiny_llama())]
    command += ["--target", str(tmp_path / "it"), "--num_added_blocks", "2", "--init", "zero_norm"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "cannot learn" in refused.stderr
    subprocess.run([*command, "--force"], check=True, capture_output=True)
    assert Manifest.read(tmp_path / "it").inits == ("zero_norm",)


def test_an_expansion_is_plain_data() -> None:
    expansion = Expansion(num_added_blocks=2, placement=Placement.SUFFIX, init=Init.RANDOM, seed=3)
    assert expansion == Expansion(num_added_blocks=2, placement=Placement.SUFFIX, init=Init.RANDOM, seed=3)
    assert expansion != Expansion(num_added_blocks=2)
    assert pickle.loads(pickle.dumps(expansion)) == expansion
    assert json.loads(json.dumps(asdict(Expansion.at(2, 5)))) == {
        "positions": [2, 5],
        "num_added_blocks": None,
        "placement": "interleaved",
        "blocks_per_group": 1,
        "init": "copy",
        "seed": 0,
    }


def test_a_count_adds_the_same_blocks_as_its_positions() -> None:
    plan = ExpansionPlan.unexpanded(4)
    assert Expansion(num_added_blocks=2).expand(plan) == Expansion.at(2, 5).expand(plan) == plan.expand((2, 5))
    suffix = Expansion(num_added_blocks=2, placement=Placement.SUFFIX)
    assert suffix.expand(plan) == Expansion.at(4, 5).expand(plan)
    assert Expansion(num_added_blocks=2, blocks_per_group=2).expand(plan) == Expansion.at(4, 5).expand(plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "an expansion needs either positions or num_added_blocks"),
        ({"positions": (2,), "num_added_blocks": 1}, "an expansion needs either positions or num_added_blocks"),
        ({"positions": (2,), "placement": Placement.PREFIX}, "are for num_added_blocks: leave them out"),
        ({"num_added_blocks": 2, "placement": "prefix"}, "'prefix' is not a member of Placement: use one of P"),
        ({"positions": (2,), "init": "random"}, "'random' is not a member of Init: use one of Init.COPY, Init.RANDOM"),
    ],
)
def test_an_ambiguous_expansion_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ExpansionError, match=message):
        Expansion(**fields)
