"""What verification proves, and that it fails where it should, naming what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron
from megatron_llamapro.checkpoint.verify import Check, verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]


def checked(original: Path, expanded: Path) -> dict[str, Check]:
    return {check.name: check for check in verify(original, expanded)}


def failures(original: Path, expanded: Path) -> dict[str, str]:
    return {name: check.text for name, check in checked(original, expanded).items() if not check.ok}


@pytest.fixture
def expanded(tiny_llama: Tiny, tmp_path: Path) -> Path:
    """4 → 6 layers, 2 a copy of 1, 5 of 4, which was 3; a test may damage it."""
    expand_hf(tiny_llama(), tmp_path / "expanded", expand=lambda plan: plan.expand((2, 5)))
    return tmp_path / "expanded"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def train(tensors: dict[str, torch.Tensor], *layers: int) -> None:
    """What training does to blocks: every weight moves."""
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
def test_an_untrained_expansion(format_name: str, settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    convert = {"hf": expand_hf, "megatron": hf_to_megatron}[format_name]
    convert(tiny_model(**settings), tmp_path / "expanded", expand=lambda plan: plan.expand((0, 3)))
    found = checked(tiny_model(**settings), tmp_path / "expanded")
    assert list(found) == ["lineage", "original tensors", "manifest", "added blocks", "function"]
    assert all(check.ok for check in found.values()), found
    assert found["added blocks"].text == "0, 3: identity, as when added"
    assert found["function"].text == "logits are equal, bit for bit, on 32 random tokens"


def test_windows_of_original_blocks_that_changed(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**TINY_FAMILIES["qwen3, alternating windows"])
    expand_hf(source, tmp_path / "expanded", expand=lambda plan: plan.expand((0, 3)))
    path = tmp_path / "expanded" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 6}))
    found = failures(source, tmp_path / "expanded")
    assert found == {"lineage": "config.json differs from the original's in window_attn_skip_freq"}


def test_a_model_without_added_blocks(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "megatron")
    found = checked(tiny_llama(), tmp_path / "megatron")
    assert list(found) == ["lineage", "original tensors", "manifest", "function"]
    assert all(check.ok for check in found.values())


def test_a_cast_is_said(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "megatron", expand=lambda plan: plan.expand((4,)), dtype="bfloat16")
    found = checked(tiny_llama(), tmp_path / "megatron")
    assert all(check.ok for check in found.values()), found
    assert "after the cast from float32 to bfloat16" in found["original tensors"].text


def test_a_trained_model(expanded: Path, tiny_llama: Tiny) -> None:
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


def test_many_that_moved_are_counted(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: train(tensors, *range(6)))
    assert "and 31 more of 39 moved" in failures(tiny_llama(), expanded)["original tensors"]


def test_a_negative_zero_is_found(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].neg_())
    assert failures(tiny_llama(), expanded).keys() == {"added blocks"}


def test_a_block_that_was_not_zeroed_is_found(expanded: Path, tiny_llama: Tiny) -> None:
    def forget(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].clone()

    edit(expanded, forget)
    found = failures(tiny_llama(), expanded)
    assert found["added blocks"] == "block 2: model.layers.2.mlp.down_proj.weight is block 1's, not zero"
    assert found["function"].startswith("logits differ by up to ")


def test_an_identity_that_is_no_copy_is_found(expanded: Path, tiny_llama: Tiny) -> None:
    edit(expanded, lambda tensors: tensors["model.layers.5.self_attn.k_proj.weight"].add_(1))
    assert failures(tiny_llama(), expanded) == {
        "added blocks": "block 5: model.layers.5.self_attn.k_proj.weight is not block 4's"
    }


def test_hashes_are_held_against_the_manifest(expanded: Path, tiny_llama: Tiny) -> None:
    path = expanded / "llamapro.json"
    manifest = json.loads(path.read_text())
    manifest["original_hashes"]["model.norm.weight"] = "0" * 64
    del manifest["original_hashes"]["lm_head.weight"]
    path.write_text(json.dumps(manifest))
    assert failures(tiny_llama(), expanded) == {
        "manifest": "model.norm.weight, lm_head.weight of 39 original tensors do not have their hash"
    }


def test_another_original_is_noticed(expanded: Path, tiny_llama: Tiny) -> None:
    assert failures(tiny_llama(num_hidden_layers=3), expanded).keys() == {"lineage"}
    assert "rotary_base" in failures(tiny_llama(rope_theta=5e5), expanded)["lineage"]
    assert failures(tiny_llama(seed=1), expanded).keys() == {"original tensors", "function"}


def test_a_second_round_against_the_first_source_and_against_the_first_round(
    expanded: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    """The first round's blocks are trained, then more are added: 0 before everything, 7 as a copy of the trained 5."""
    edit(expanded, lambda tensors: train(tensors, 2, 5))
    expand_hf(expanded, tmp_path / "second", expand=lambda plan: plan.expand((0, 7)))
    against_source = checked(tiny_llama(), tmp_path / "second")
    assert all(check.ok for check in against_source.values()), against_source
    assert against_source["added blocks"].text == "0, 7: identity, as when added; 3, 6: trained"
    against_first = checked(expanded, tmp_path / "second")
    assert all(check.ok for check in against_first.values()), against_first
    assert against_first["added blocks"].text == "0, 7: identity, as when added"
    assert "function" in against_first


def test_a_folder_without_a_manifest(tiny_llama: Tiny) -> None:
    with pytest.raises(CheckpointError, match="has no manifest, so nothing says which of its blocks were added"):
        checked(tiny_llama(), tiny_llama())


def test_progress_reports_what_is_read(expanded: Path, tiny_llama: Tiny) -> None:
    seen: list[int] = []
    list(verify(tiny_llama(), expanded, progress=seen.append))
    assert sum(seen) > sum(path.stat().st_size for path in expanded.glob("*.safetensors"))
