"""Verification proves a dial, and names what does not follow from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llamapro.checkpoint.convert import DialSetting, expand_hf, hf_to_hf, hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.proof.verify import Check, verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import Trained
from megatron_llamapro.expansion.round import Expansion

Tiny = Callable[..., Path]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def train(folder: Path, *parts: str) -> Path:
    """Move every weight whose name contains one of the parts."""
    generator = torch.Generator().manual_seed(0)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if any(part in name for part in parts):
                tensor += (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    edit(folder, move)
    return folder


def checked(original: Path, expanded: Path, **settings: object) -> dict[str, Check]:
    return {check.name: check for check in verify(original, expanded, **settings)}


def failures(original: Path, expanded: Path, **settings: object) -> dict[str, str]:
    return {name: check.text for name, check in checked(original, expanded, **settings).items() if not check.ok}


@pytest.fixture
def blocks(tiny_model: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return an original, and its expansion with trained blocks 2 and 5, and other parts."""

    def make(*parts: str, **settings: object) -> tuple[Path, Path]:
        expand_hf(tiny_model(**settings), tmp_path / "trained", expansion=Expansion.at(2, 5))
        return tiny_model(**settings), train(tmp_path / "trained", "layers.2.", "layers.5.", *parts)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dial_of_added_blocks_is_proven(dtype: str, blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks(dtype=dtype)
    hf_to_megatron(run, tmp_path / "dialed", dial=DialSetting((0.3, 0.75)))
    found = checked(original, tmp_path / "dialed", undialed=run)
    assert list(found) == ["lineage", "dial", "original tensors", "manifest", "added blocks"]
    assert all(check.ok for check in found.values()), found
    assert found["dial"].text == f"4 tensors are × 0.3, 0.75 of {run}, all others are equal, bit for bit"
    assert found["added blocks"].text == "2, 5: trained"
    assert checked(original, tmp_path / "dialed")["dial"].text == (
        "recorded as × 0.3, 0.75, but not checked: give --undialed, the checkpoint before the dial"
    )


def test_a_dial_of_original_weights_is_proven(blocks: Callable, tmp_path: Path) -> None:
    """Without --undialed they count as moved."""
    original, run = blocks("embed_tokens", "layers.3.", dtype="bfloat16")
    hf_to_hf(run, tmp_path / "dialed", dial=DialSetting(0.75, original))
    found = checked(original, tmp_path / "dialed", undialed=run)
    assert all(check.ok for check in found.values()), found
    assert found["dial"].text.startswith("14 tensors are × 0.75 of ")  # 4 + the embedding + the 9 of a block
    assert found["original tensors"].text == "29 bit-identical"
    assert failures(original, tmp_path / "dialed").keys() == {"original tensors", "manifest"}


def test_a_dial_of_all_weights_is_proven(tiny_model: Tiny, tmp_path: Path) -> None:
    original = tiny_model()
    hf_to_megatron(original, tmp_path / "start")
    megatron_to_hf(tmp_path / "start", tmp_path / "run")
    train(tmp_path / "run", "model", "lm_head")
    hf_to_hf(tmp_path / "run", tmp_path / "dialed", dial=DialSetting(0.5, original))
    found = checked(original, tmp_path / "dialed", undialed=tmp_path / "run")
    assert all(check.ok for check in found.values()), found
    assert found["dial"].text.startswith("39 tensors are × 0.5 of ") and "function" not in found
    edit(tmp_path / "dialed", lambda tensors: tensors["model.norm.weight"][0].add_(1e-6))
    assert failures(original, tmp_path / "dialed", undialed=tmp_path / "run")["dial"].startswith("model.norm.weight is")
    assert "is another model" in failures(original, tmp_path / "dialed", undialed=original)["dial"]  # it has no record


def test_at_0_the_model_is_proven_to_be_the_original(blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks("lm_head")
    hf_to_hf(run, tmp_path / "off", dial=DialSetting(0, original))
    for settings in ({}, {"undialed": run}):
        found = checked(original, tmp_path / "off", **settings)
        assert all(check.ok for check in found.values()), found
        assert found["added blocks"].text == "2, 5: identity, dialed to 0"
        assert found["function"].text.startswith("logits are equal, bit for bit, on 32 random tokens, by this program")
    found = failures(original, tmp_path / "off", trained=Trained.NOTHING)
    assert found["added blocks"].startswith("block 2: it was trained, then dialed to 0")


def test_one_block_may_be_off(blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks()
    hf_to_hf(run, tmp_path / "one", dial=DialSetting((0, 1)))
    found = checked(original, tmp_path / "one", undialed=run)
    assert found["added blocks"].text == "2: identity, dialed to 0; 5: trained"
    hf_to_hf(tmp_path / "one", tmp_path / "both", dial=DialSetting((1, 0)))
    found = checked(original, tmp_path / "both", undialed=tmp_path / "one")
    assert all(check.ok for check in found.values()) and "function" in found
    assert found["added blocks"].text == "2, 5: identity, dialed to 0"


def test_zeros_without_a_record_are_no_dial(blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks()
    hf_to_hf(run, tmp_path / "off", dial=DialSetting(0))
    for name, change in (
        ("llamapro.json", lambda data: data.pop("dial")),
        ("llamapro.json", lambda data: data.update(dial=None)),
    ):
        data = json.loads((tmp_path / "off" / name).read_text())
        change(data)
        (tmp_path / "off" / name).write_text(json.dumps(data))
        assert "is not what init copy makes of block 1" in failures(original, tmp_path / "off")["added blocks"]


TAMPERED = {
    "an output projection": "model.layers.5.mlp.down_proj.weight",
    "another tensor of an added block": "model.layers.2.mlp.up_proj.weight",
    "an original tensor": "model.layers.0.input_layernorm.weight",
    "the embedding": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("scale", [0.5, 0])
@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_bit_is_found(what: str, scale: float, blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks("embed_tokens", dtype="bfloat16")
    hf_to_hf(run, tmp_path / "dialed", dial=DialSetting(scale, original))
    edit(tmp_path / "dialed", lambda tensors: tensors[TAMPERED[what]].view(torch.int16).flatten()[-1:].bitwise_xor_(1))
    found = failures(original, tmp_path / "dialed", undialed=run, quick=True)
    assert found["dial"] == f"{TAMPERED[what]} is not × {scale} of {run}"


def test_another_scale_than_recorded_is_found(blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks()
    hf_to_hf(run, tmp_path / "dialed", dial=DialSetting(0.5))
    path = tmp_path / "dialed" / "llamapro.json"
    path.write_text(path.read_text().replace('"added_block_scale": 0.5', '"added_block_scale": 0.625'))
    found = failures(original, tmp_path / "dialed", undialed=run, quick=True)
    assert found["dial"] == f"model.layers.2.self_attn.o_proj.weight and 3 more is not × 0.625 of {run}"


def test_another_run_is_found(blocks: Callable, tiny_model: Tiny, tmp_path: Path) -> None:
    original, run = blocks()
    hf_to_hf(run, tmp_path / "dialed", dial=DialSetting(0.5))
    hf_to_hf(run, tmp_path / "longer")
    train(tmp_path / "longer", "layers.5.mlp.down_proj")
    found = failures(original, tmp_path / "dialed", undialed=tmp_path / "longer")["dial"]
    assert found.endswith("is not what was dialed: model.layers.5.mlp.down_proj.weight has another hash")
    found = failures(original, tmp_path / "dialed", undialed=tiny_model())["dial"]
    assert found.endswith("is another model than the one that was dialed")


def test_the_second_of_two_dials_is_proven(blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks(dtype="bfloat16")
    hf_to_hf(run, tmp_path / "once", dial=DialSetting(0.7))
    hf_to_hf(tmp_path / "once", tmp_path / "twice", dial=DialSetting(0.3))
    found = checked(original, tmp_path / "twice", undialed=tmp_path / "once")
    assert all(check.ok for check in found.values()), found
    assert found["dial"].text.startswith(f"4 tensors are × 0.3 of {tmp_path / 'once'}")
    assert "is not what was dialed" in failures(original, tmp_path / "twice", undialed=run)["dial"]


def test_a_dial_that_also_casts_is_proven(blocks: Callable, tmp_path: Path) -> None:
    original, run = blocks("embed_tokens")
    hf_to_hf(run, tmp_path / "dialed", dial=DialSetting(0.7, original), dtype="bfloat16")
    assert not failures(original, tmp_path / "dialed", undialed=run)


def test_a_model_that_was_not_dialed_is_refused(blocks: Callable) -> None:
    original, run = blocks()
    with pytest.raises(CheckpointError, match=r"is not dialed, its llamapro\.json records no dial: leave out"):
        list(verify(original, run, undialed=run))
