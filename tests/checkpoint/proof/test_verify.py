"""Verification proves what it claims, fails where it should, and names what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, megatron_to_megatron
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.proof.verify import Check, verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.plan import Trained
from megatron_llamapro.expansion.round import Expansion, Init
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]


def checked(original: Path, expanded: Path, **settings: Any) -> dict[str, Check]:
    return {check.name: check for check in verify(original, expanded, **settings)}


def failures(original: Path, expanded: Path, **settings: Any) -> dict[str, str]:
    return {name: check.text for name, check in checked(original, expanded, **settings).items() if not check.ok}


@pytest.fixture
def expanded(tiny_llama: Tiny, tmp_path: Path) -> Path:
    """Return an expanded model, 4 → 6 layers: 2 copies 1, 5 copies 4 (originally 3). A test may damage it."""
    expand_hf(tiny_llama(), tmp_path / "expanded", expansion=Expansion.at(2, 5))
    return tmp_path / "expanded"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip(folder: Path, name: str, *, mask: int = 1) -> None:
    """Flip bits in the last byte of a tensor's first row, in a checkpoint of any format."""
    tensor = open_checkpoint(folder)
    piece = tensor.tensors[name].pieces[0]
    with piece.file.open("r+b") as file:
        file.seek(piece.offset + piece.num_columns * tensor.itemsize - 1)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ mask]))


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "llamapro.json").read_text())
    change(manifest)
    (folder / "llamapro.json").write_text(json.dumps(manifest))


def train(tensors: dict[str, torch.Tensor], *layers: int) -> None:
    """Move every weight of these blocks, as training does."""
    for name, tensor in tensors.items():
        if any(name.startswith(f"model.layers.{layer}.") for layer in layers):
            tensor += 0.01


@pytest.mark.parametrize("format_name", ["hf", "megatron"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "dtype": "bfloat16", "num_key_value_heads": 4},
        TINY_FAMILIES["qwen3, alternating windows"],
        TINY_FAMILIES["mixtral"],
        TINY_FAMILIES["llama, biases"],
    ],
    ids=["1", "2", "qwen3", "mixtral", "biases"],
)
def test_an_untrained_expansion_passes(format_name: str, settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    convert = {"hf": expand_hf, "megatron": hf_to_megatron}[format_name]
    convert(tiny_model(**settings), tmp_path / "expanded", expansion=Expansion.at(0, 3))
    found = checked(tiny_model(**settings), tmp_path / "expanded")
    assert list(found) == ["lineage", "original tensors", "manifest", "added blocks", "function"]
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "0, 3: identity, as when added"
    agree = "by this program and by transformers [0-9.]+, which agree"
    assert re.fullmatch(f"logits are equal, bit for bit, on 32 random tokens, {agree}", found["function"].text)


def test_changed_windows_of_original_blocks_are_found(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**TINY_FAMILIES["qwen3, alternating windows"])
    expand_hf(source, tmp_path / "expanded", expansion=Expansion.at(0, 3))
    path = tmp_path / "expanded" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 6}))
    found = failures(source, tmp_path / "expanded")
    assert found == {"lineage": "config.json differs from the original's in window_attn_skip_freq"}


def test_a_model_without_added_blocks_passes(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "megatron")
    found = checked(tiny_llama(), tmp_path / "megatron")
    assert list(found) == ["lineage", "original tensors", "manifest", "function"]
    assert all(check.ok for check in found.values())


def test_a_cast_is_reported(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "megatron", expansion=Expansion.at(4), dtype="bfloat16")
    found = checked(tiny_llama(), tmp_path / "megatron")
    assert all(check.ok for check in found.values()), found
    assert "after the cast from float32 to bfloat16" in found["original tensors"].text


def test_a_trained_model_passes(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: train(tensors, 5))
    found = checked(tiny_llama(), expanded)
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "2: identity, as when added; 5: trained"
    assert "function" not in found


def test_an_original_that_moved_is_named(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: train(tensors, 2, 5))
    edit(expanded, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][5, 7].add_(1e-6))
    found = failures(tiny_llama(), expanded)
    assert found.keys() == {"original tensors", "manifest"}
    assert all(text.startswith("model.layers.3.mlp.up_proj.weight ") for text in found.values())


def test_many_originals_that_moved_are_counted(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: train(tensors, *range(6)))
    assert "and 31 more of 39 moved" in failures(tiny_llama(), expanded)["original tensors"]


def test_a_negative_zero_is_found(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].neg_())
    assert failures(tiny_llama(), expanded).keys() == {"added blocks"}


def test_an_added_block_that_is_not_zeroed_is_found(expanded: Path, tiny_llama: Tiny) -> None:
    def forget(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].clone()

    edit(expanded, forget)
    found = failures(tiny_llama(), expanded)
    assert found["added blocks"] == "block 2: model.layers.2.mlp.down_proj.weight is block 1's, not zero"
    assert found["function"].startswith("logits differ by up to ")


def test_an_identity_block_that_is_not_a_copy_is_found(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: tensors["model.layers.5.self_attn.k_proj.weight"].add_(1))
    assert failures(tiny_llama(), expanded) == {
        "added blocks": "block 5: model.layers.5.self_attn.k_proj.weight is not what init copy makes of block 4"
    }


def test_hashes_are_compared_with_the_manifest(expanded: Path, tiny_llama: Tiny) -> None:
    def change(manifest: dict) -> None:
        manifest["original_hashes"]["model.norm.weight"] = "0" * 64
        del manifest["original_hashes"]["lm_head.weight"]

    edit_manifest(expanded, change)
    assert failures(tiny_llama(), expanded) == {
        "manifest": "model.norm.weight, lm_head.weight of 39 original tensors do not match their hash"
    }


def test_a_wrong_original_is_noticed(expanded: Path, tiny_llama: Tiny) -> None:
    assert failures(tiny_llama(num_hidden_layers=3), expanded).keys() == {"lineage"}
    assert "rotary_base" in failures(tiny_llama(rope_theta=5e5), expanded)["lineage"]
    assert failures(tiny_llama(seed=1), expanded).keys() == {"original tensors", "added blocks", "function"}


@pytest.mark.parametrize("convert", [expand_hf, hf_to_megatron])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_mean_blocks_are_recomputed(convert: Callable, dtype: str | None, tiny_llama: Tiny, tmp_path: Path) -> None:
    """Block 2 is the mean of 1 and 2 (now 3). Block 5 copies the old 3, because no block follows it."""
    convert(tiny_llama(), tmp_path / "it", expansion=Expansion.at(2, 5, init=Init.MEAN), dtype=dtype)
    found = checked(tiny_llama(), tmp_path / "it", trained=Trained.NOTHING)
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "2, 5: identity, as when added"


def test_mean_blocks_cast_later_pass(tiny_llama: Tiny, tmp_path: Path) -> None:
    """They differ from the means of the cast blocks."""
    hf_to_megatron(tiny_llama(), tmp_path / "it", expansion=Expansion.at(2, 5, init=Init.MEAN))
    megatron_to_megatron(tmp_path / "it", tmp_path / "cast", dtype="bfloat16")
    assert failures(tiny_llama(), tmp_path / "cast", trained=Trained.NOTHING) == {}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("convert", [expand_hf, hf_to_megatron])
def test_random_blocks_are_drawn_again(convert: Callable, dtype: str | None, tiny_llama: Tiny, tmp_path: Path) -> None:
    convert(tiny_llama(), tmp_path / "it", expansion=Expansion.at(2, 5, init=Init.RANDOM, seed=7), dtype=dtype)
    found = checked(tiny_llama(), tmp_path / "it", trained=Trained.NOTHING)
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "2, 5: identity, as when added"
    edit_manifest(tmp_path / "it", lambda manifest: manifest.update(init_seeds=[8]))
    assert failures(tiny_llama(), tmp_path / "it", quick=True)["added blocks"].startswith(
        "block 2: model.layers.2.self_attn.q_proj.weight is not what init random makes of block 1; block 5: "
    )


def test_random_blocks_of_every_round_are_drawn_again(tiny_llama: Tiny, tmp_path: Path) -> None:
    """They are drawn under the names and in the type that they had before later rounds and casts."""
    first, second = (Expansion.at(*at, init=Init.RANDOM, seed=seed) for at, seed in (((2, 5), 3), ((0, 7), 4)))
    hf_to_megatron(tiny_llama(), tmp_path / "1", expansion=first)
    megatron_to_megatron(tmp_path / "1", tmp_path / "2", expansion=second)
    megatron_to_megatron(tmp_path / "2", tmp_path / "cast", dtype="bfloat16")
    for folder in ("2", "cast"):
        found = checked(tiny_llama(), tmp_path / folder, quick=True, trained=Trained.NOTHING)
        assert all(check.ok for check in found.values()), found
        assert found["added blocks"].text == "0, 3, 6, 7: identity, as when added"
    flip(tmp_path / "2", "model.layers.3.mlp.up_proj.weight")
    assert failures(tmp_path / "1", tmp_path / "2", quick=True).keys() == {"earlier rounds"}
    flip(tmp_path / "2", "model.layers.7.mlp.gate_proj.weight")
    assert failures(tiny_llama(), tmp_path / "2", quick=True) == {
        "added blocks": "block 3: model.layers.3.mlp.up_proj.weight is not what init random makes of block 2; "
        "block 7: model.layers.7.mlp.gate_proj.weight is not what init random makes of block 6"
    }


def test_random_blocks_without_a_seed_are_proven_by_zeros_norms_and_shapes(tiny_llama: Tiny, tmp_path: Path) -> None:
    expand_hf(tiny_llama(), tmp_path / "it", expansion=Expansion.at(2, 5, init=Init.RANDOM))
    edit_manifest(tmp_path / "it", lambda manifest: manifest.pop("init_seeds"))
    flip(tmp_path / "it", "model.layers.2.mlp.up_proj.weight")
    found = checked(tiny_llama(), tmp_path / "it", trained=Trained.NOTHING)
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == (
        "2, 5: identity by its zeros; of its other values only norms and shapes are proven: their seed was not recorded"
    )


FLIPS = {
    "a projection of a mean": (Init.MEAN, "2.mlp.up_proj", 1, "is not what init mean makes of block 1"),
    "a norm of a mean": (Init.MEAN, "5.input_layernorm", 1, "is not what init mean makes of block 4"),
    "a zero of a mean": (Init.MEAN, "2.mlp.down_proj", 1, "is not zero"),
    "a zero's sign": (Init.MEAN, "5.self_attn.o_proj", 0x80, "holds -0.0, but was initialised to +0.0"),
    "a norm of a random block": (Init.RANDOM, "2.input_layernorm", 1, "is not what init random makes of block 1"),
    "a value of a random block": (Init.RANDOM, "5.mlp.up_proj", 1, "is not what init random makes of block 4"),
    "a zero of a random block": (Init.RANDOM, "5.mlp.down_proj", 1, "is not zero"),
    "a zeroed norm": (Init.ZERO_NORM, "2.input_layernorm", 1, "is not zero"),
    "an output projection under it": (Init.ZERO_NORM, "2.mlp.down_proj", 1, "is not what init zero_norm makes of"),
    "a zero of a copy": (Init.COPY, "2.mlp.down_proj", 1, "is not zero"),
}


@pytest.mark.parametrize(("init", "name", "mask", "text"), FLIPS.values(), ids=FLIPS.keys())
@pytest.mark.parametrize("convert", [expand_hf, hf_to_megatron])
def test_a_flipped_bit_of_an_added_block_is_named(
    convert: Callable, init: Init, name: str, mask: int, text: str, tiny_llama: Tiny, tmp_path: Path
) -> None:
    convert(tiny_llama(), tmp_path / "it", expansion=Expansion.at(2, 5, init=init))
    flip(tmp_path / "it", f"model.layers.{name}.weight", mask=mask)
    found = failures(tiny_llama(), tmp_path / "it", quick=True, trained=Trained.NOTHING)
    assert found.keys() == {"added blocks"}
    assert found["added blocks"].startswith(f"block {name[0]}: model.layers.{name}.weight {text}")


@pytest.fixture
def second(expanded: Path, tmp_path: Path) -> Path:
    """Return a second round on trained blocks of the first: block 0 is the mean of 0 and 1 (now 1
    and 2). Block 7 copies the trained 5 (now 6)."""
    edit(expanded, lambda tensors: train(tensors, 2, 5))
    expand_hf(expanded, tmp_path / "second", expansion=Expansion.at(0, 7, init=Init.MEAN))
    return tmp_path / "second"


def test_a_second_round_passes_against_the_first_source(second: Path, tiny_llama: Tiny) -> None:
    found = checked(tiny_llama(), second)
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "0, 7: identity, as when added; 3, 6: trained"


def test_a_second_round_passes_against_the_first_round(second: Path, expanded: Path) -> None:
    found = checked(expanded, second, trained=Trained.NOTHING)
    assert all(check.ok for check in found.values()), found
    assert found["earlier rounds"].text == "18 tensors of their blocks bit-identical"
    assert found["added blocks"].text == "0, 7: identity, as when added"
    assert "function" in found


@pytest.mark.parametrize("name", ["3.mlp.down_proj", "6.input_layernorm"])
def test_a_flipped_bit_of_an_earlier_rounds_block_is_named(name: str, second: Path, expanded: Path) -> None:
    flip(second, f"model.layers.{name}.weight")
    found = failures(expanded, second, quick=True)
    assert found == {
        "earlier rounds": f"model.layers.{name}.weight of 18 moved "
        "(if this round trained them too, give --trained added_blocks)"
    }


def test_rounds_trained_together_pass(second: Path, expanded: Path) -> None:
    edit(second, lambda tensors: train(tensors, 0, 3, 6, 7))
    assert failures(expanded, second).keys() == {"earlier rounds"}
    found = checked(expanded, second, trained=Trained.ADDED_BLOCKS)
    assert all(check.ok for check in found.values()), found
    assert found["earlier rounds"].text == "18 of 18 tensors trained since"


def test_an_earlier_round_trained_alone_needs_the_model_it_expanded(
    second: Path, expanded: Path, tiny_llama: Tiny
) -> None:
    """Block 7 copied an earlier state of 6. Only the model that the round expanded proves it, not the first source."""
    edit(second, lambda tensors: train(tensors, 6))
    found = checked(expanded, second, trained=Trained.ADDED_BLOCKS)
    assert all(check.ok for check in found.values()), found
    assert "function" not in found
    assert failures(tiny_llama(), second)["added blocks"] == (
        "block 7: model.layers.7.input_layernorm.weight is not what init mean makes of block 6 as it is now: "
        "compare with the model that round 2 expanded"
    )


def test_a_plan_that_no_rounds_produce_is_found(second: Path, tiny_llama: Tiny) -> None:
    edit_manifest(second, lambda manifest: manifest["plan"]["layers"][7].update(parent_layer=3))
    assert failures(tiny_llama(), second) == {"lineage": "its plan does not follow from its rounds"}


def test_an_original_with_more_rounds_is_refused(second: Path, expanded: Path) -> None:
    assert failures(second, expanded) == {"lineage": "its plan does not start from the original's 8 blocks"}


def test_a_folder_without_a_manifest_is_refused(tiny_llama: Tiny) -> None:
    with pytest.raises(CheckpointError, match="has no manifest to say which blocks were added"):
        checked(tiny_llama(), tiny_llama())


def test_progress_reports_the_bytes_read(expanded: Path, tiny_llama: Tiny) -> None:
    seen: list[int] = []
    list(verify(tiny_llama(), expanded, progress=seen.append))
    assert sum(seen) > sum(path.stat().st_size for path in expanded.glob("*.safetensors"))
