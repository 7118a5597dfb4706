"""Expanded models that other software trained and saved in another type: every command accepts them, and says what the
manifest's hashes still prove."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import Check, verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.plan import Trained
from megatron_llamapro.expansion.round import Expansion, Init

Tiny = Callable[..., Path]
ADDED, TOKENS = Expansion.at(2, 5), torch.arange(3, 43)[None]


def fine_tune(source: Path, target: Path, *, dtype: torch.dtype, only: tuple[int, ...] | None = None) -> Path:
    """Take one SGD step in transformers on all weights, or on those of `only`, and save with transformers."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = only is None or any(f".layers.{layer}." in name for layer in only)
    model(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.save_pretrained(target)
    return target


def checked(original: Path, expanded: Path, **options: object) -> dict[str, Check]:
    return {check.name: check for check in verify(original, expanded, **options)}


@pytest.fixture
def export(tiny_llama: Tiny, tmp_path: Path) -> Path:
    """Return an expanded model in float32, exported from Megatron."""
    hf_to_megatron(tiny_llama(), tmp_path / "megatron", expansion=ADDED)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    return tmp_path / "export"


def test_added_blocks_trained_in_bfloat16_verify(export: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    """The float32 original proves that the cast alone changed original tensors."""
    tuned = fine_tune(export, tmp_path / "tuned", dtype=torch.bfloat16, only=(2, 5))
    assert "bfloat16, made from tiny" in str(inspect(tuned))
    found = checked(tiny_llama(), tuned)
    assert all(check.ok for check in found.values()), found
    assert found["original tensors"].text == "39 bit-identical, after the cast from float32 to bfloat16"
    assert found["manifest"].text == "39 original tensors match their hash"
    assert found["added blocks"].text == "2, 5: trained"


def test_a_wrong_original_of_the_right_type_has_no_hash(export: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    """It equals the tuned model in bfloat16, but the model was not made from it."""
    tuned = fine_tune(export, tmp_path / "tuned", dtype=torch.bfloat16, only=(2, 5))
    rounded = tmp_path / "rounded"
    AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16).float().save_pretrained(rounded)
    found = checked(rounded, tuned)
    assert [name for name, check in found.items() if not check.ok] == ["manifest"]
    assert "original tensors do not match their hash" in found["manifest"].text


def test_an_original_of_neither_type_proves_what_it_can(export: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    tuned = fine_tune(export, tmp_path / "tuned", dtype=torch.bfloat16, only=(2, 5))
    expand = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16)
    expand.save_pretrained(tmp_path / "bfloat16")
    found = checked(tmp_path / "bfloat16", tuned)
    assert all(check.ok for check in found.values())
    assert found["manifest"].text.startswith("nothing is proven: its hashes are of float32 tensors")


def test_all_weights_trained_in_bfloat16_can_be_converted_any_way(
    export: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    """Expanded again, to Megatron and back, and cast back: hashes and lineage remain those of the first source."""
    tuned = fine_tune(export, tmp_path / "tuned", dtype=torch.bfloat16)
    first = Manifest.read(export)
    again = Expansion.at(0, 7)
    expand_hf(tuned, tmp_path / "hf", expansion=again)
    hf_to_megatron(tuned, tmp_path / "megatron-2", expansion=again)
    megatron_to_hf(tmp_path / "megatron-2", tmp_path / "back")
    megatron_to_megatron(tmp_path / "megatron-2", tmp_path / "float32", dtype="float32")
    for name in ("hf", "megatron-2", "back", "float32"):
        manifest = Manifest.read(tmp_path / name)
        assert (manifest.source, manifest.original_hashes) == (first.source, first.original_hashes)
        assert (manifest.hash_dtype, manifest.plan.added_layers) == ("float32", (0, 3, 6, 7))
        found = checked(tuned, tmp_path / name)
        assert all(check.ok for check in found.values()), found
        assert {"original tensors", "earlier rounds", "added blocks", "function"} <= found.keys()
        moved = checked(tiny_llama(), tmp_path / name, quick=True, trained=Trained.ADDED_BLOCKS)
        assert not moved["original tensors"].ok
    assert json.loads((tmp_path / "back" / "config.json").read_text())["llamapro"]["hash_dtype"] == "float32"
    loaded = [AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits for folder in (tuned, tmp_path / "hf")]
    assert torch.equal(*loaded)


def test_all_weights_trained_in_the_same_type_are_reported(export: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    """A later round is not blamed for earlier changes; the round that made them is."""
    tuned = fine_tune(export, tmp_path / "tuned", dtype=torch.float32)
    expand_hf(tuned, tmp_path / "hf", expansion=Expansion.at(0, 7))
    found = checked(tuned, tmp_path / "hf")
    assert all(check.ok for check in found.values()), found
    assert "39 differ from their hash, as they do in the original: trained before" in found["manifest"].text
    assert not checked(tiny_llama(), tuned)["manifest"].ok
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    found = checked(tuned, tmp_path / "hf", quick=True)
    assert not found["original tensors"].ok and not found["manifest"].ok


def test_a_trained_model_can_be_cast(export: Path, tmp_path: Path) -> None:
    """The record of its original tensors stays the same, although some moved."""
    tuned = fine_tune(export, tmp_path / "tuned", dtype=torch.float32)
    expand_hf(tuned, tmp_path / "hf", expansion=Expansion.at(0), dtype="bfloat16")
    manifest = Manifest.read(tmp_path / "hf")
    assert (manifest.dtype, manifest.hash_dtype) == ("bfloat16", "float32")
    assert manifest.original_hashes == Manifest.read(export).original_hashes


WIDENED = [("float16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16")]
"""The original's type, and the type it was converted to before it was saved as float32."""


@pytest.fixture
def widened(tiny_llama: Tiny, tmp_path: Path) -> Path:
    """Return a model whose block 2 was trained in float32, from a bfloat16 export of a float32 original."""
    hf_to_megatron(tiny_llama(), tmp_path / "megatron", expansion=ADDED, dtype="bfloat16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    return fine_tune(tmp_path / "export", tmp_path / "widened", dtype=torch.float32, only=(2,))


@pytest.mark.parametrize(("first", "converted"), WIDENED)
def test_added_blocks_trained_in_a_wider_type_verify(
    first: str, converted: str, tiny_llama: Tiny, tmp_path: Path
) -> None:
    """The original proves as much as for the same model converted back to the type of its export."""
    original = tiny_llama(dtype=first)
    hf_to_megatron(original, tmp_path / "megatron", expansion=ADDED, dtype=converted)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    tuned = fine_tune(tmp_path / "export", tmp_path / "tuned", dtype=torch.float32, only=(2,))
    hf_to_megatron(tuned, tmp_path / "back", dtype=converted)
    for folder in (tuned, tmp_path / "back"):
        found = checked(original, folder)
        assert all(check.ok for check in found.values()), found
        assert found["manifest"].text == "39 original tensors match their hash"
        assert found["added blocks"].text == "5: identity, as when added; 2: trained"
    cast = f"39 bit-identical, after the cast from {first} to {converted}, then to float32"
    assert checked(original, tuned)["original tensors"].text == cast


@pytest.mark.parametrize("init", Init)
def test_a_megatron_checkpoint_cast_to_a_wider_type_verifies(init: Init, tiny_llama: Tiny, tmp_path: Path) -> None:
    """Blocks of earlier rounds are rebuilt in the type that they were made in."""
    again = Expansion.at(0, 7, init=init, seed=4)
    hf_to_megatron(tiny_llama(), tmp_path / "1", expansion=Expansion.at(2, 5, init=init, seed=3), dtype="bfloat16")
    megatron_to_megatron(tmp_path / "1", tmp_path / "2", expansion=again)
    megatron_to_megatron(tmp_path / "2", tmp_path / "float32", dtype="float32")
    for source, layers in ((tiny_llama(), "0, 3, 6, 7"), (tmp_path / "1", "0, 7")):
        found = checked(source, tmp_path / "float32", trained=Trained.NOTHING)
        assert all(check.ok for check in found.values()), found
        assert found["manifest"].text == "39 original tensors match their hash"
        assert found["added blocks"].text == f"{layers}: identity, as when added"
        assert found["function"].text.startswith("logits are equal, bit for bit")


def test_mean_blocks_made_in_a_wider_type_than_the_source_verify(tiny_llama: Tiny, tmp_path: Path) -> None:
    """They were also cast to a third type since."""
    source = tiny_llama(dtype="float16")
    hf_to_megatron(source, tmp_path / "made", expansion=Expansion.at(2, 5, init=Init.MEAN), dtype="float32")
    megatron_to_megatron(tmp_path / "made", tmp_path / "cast", dtype="bfloat16")
    found = checked(source, tmp_path / "cast", trained=Trained.NOTHING)
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "2, 5: identity, as when added"


def test_changes_in_a_wider_type_are_named(widened: Path, tiny_llama: Tiny) -> None:
    """Changes too small for the narrower type, blocks that are not copies, and other hashes are all named."""
    path, norm, copy = widened / "model.safetensors", "model.norm.weight", "model.layers.5.mlp.up_proj.weight"
    tensors = load_file(path)
    for name in (norm, copy):
        tensors[name][..., 0] *= 1 + 2**-20
    save_file(tensors, path, metadata={"format": "pt"})
    found = {name: check.text for name, check in checked(tiny_llama(), widened).items() if not check.ok}
    assert found == {
        "original tensors": f"{norm} of 39 moved",
        "added blocks": f"block 5: {copy} is not what init copy makes of block 4",
    }
    config = json.loads((widened / "config.json").read_text())
    config["llamapro"]["original_hashes"][norm] = "0" * 64
    (widened / "config.json").write_text(json.dumps(config))
    assert checked(tiny_llama(), widened)["manifest"].text == f"{norm} of 39 original tensors do not match their hash"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_trained_in_a_wider_type_can_be_expanded_again(
    dtype: str, widened: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    """The trained block has digits that the manifest's type cannot hold; the round keeps or loses them, and both
    verify."""
    again = Expansion.at(0, 7, init=Init.MEAN)
    hf_to_megatron(widened, tmp_path / "again", expansion=again, dtype=dtype)
    megatron_to_megatron(tmp_path / "again", tmp_path / "float32", dtype="float32")
    for folder in (tmp_path / "again", tmp_path / "float32"):
        found = checked(widened, folder, trained=Trained.NOTHING)
        assert all(check.ok for check in found.values()), found
        assert {"earlier rounds", "function"} <= found.keys()
        found = checked(tiny_llama(), folder)
        assert all(check.ok for check in found.values()), found
        assert found["manifest"].text == "39 original tensors match their hash"


def test_a_megatron_checkpoint_saved_in_another_type_is_read(tiny_llama: Tiny, tmp_path: Path) -> None:
    """As written by Megatron-LM, with the llamapro.json of its source copied beside it."""
    hf_to_megatron(tiny_llama(), tmp_path / "float32", expansion=ADDED)
    hf_to_megatron(tiny_llama(), tmp_path / "theirs", expansion=ADDED, dtype="bfloat16")
    Manifest.read(tmp_path / "float32").write(tmp_path / "theirs")
    megatron_to_hf(tmp_path / "theirs", tmp_path / "hf")
    manifest = Manifest.read(tmp_path / "hf")
    assert manifest == dataclasses.replace(Manifest.read(tmp_path / "float32"), dtype="bfloat16", hashed_as="float32")
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "hf"))


def test_a_manifest_with_another_layer_count_says_how_to_do_without(export: Path, tmp_path: Path) -> None:
    """Merging tools leave such a config.json."""
    path = export / "config.json"
    (export / "llamapro.json").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 5}))
    with pytest.raises(
        CheckpointError, match=r"remove llamapro\.json and llamapro in config\.json to treat it as a model"
    ):
        hf_to_megatron(export, tmp_path / "target")
