"""Exports are ordinary checkpoints: transformers loads them without a warning and computes the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.formats.open import OpenTensors, open_checkpoint
from megatron_llamapro.checkpoint.proof.reference import logits as reference_logits
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]

LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "grouped queries": {},
    "tied, bfloat16, every head its own keys": {
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "num_key_value_heads": 4,
    },
    "float16": {"dtype": "float16"},
    "llama3 scaling, head_dim given": {"rope_parameters": LLAMA_3_SCALING, "head_dim": 32},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    **TINY_FAMILIES,
}
ONE_OF_EACH_FAMILY = {
    settings["model_type"]: settings for settings in (*TINY_FAMILIES.values(), {"model_type": "llama"})
}


def load(folder: Path) -> PreTrainedModel:
    """Load with transformers; no tensor may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def some_tokens() -> torch.Tensor:
    return torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(some_tokens()).logits


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_expanded_logits_equal_the_originals(settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**settings)
    expand_hf(source, tmp_path / "hf", expansion=Expansion.at(1, 4, 6), max_shard_bytes=100_000)
    hf_to_megatron(source, tmp_path / "megatron", expansion=Expansion.at(0, 1, 5, 6))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "through")
    expected = logits_of(load(source))
    assert expected.std() > 0.1
    for folder in (tmp_path / "hf", tmp_path / "through"):
        expanded = load(folder)
        assert expanded.dtype == load(source).dtype
        assert torch.equal(logits_of(expanded), expected)


def test_exports_can_be_read_by_transformers_4(tiny_model: Tiny, tmp_path: Path) -> None:
    """It ignores rope_parameters, the only spelling that transformers 5 writes."""
    source = tiny_model(**MODELS["llama3 scaling, head_dim given"])
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    expand_hf(source, tmp_path / "hf", expansion=Expansion.at(1))
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "through")
    scaling = {name: value for name, value in LLAMA_3_SCALING.items() if name != "rope_theta"}
    for folder in (tmp_path / "hf", tmp_path / "through"):
        config = json.loads((folder / "config.json").read_text())
        assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, scaling)


@pytest.mark.parametrize("family", ONE_OF_EACH_FAMILY)
def test_loading_is_silent(family: str, tiny_model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Warnings are errors in these tests; transformers must not log one either."""
    expand_hf(tiny_model(**ONE_OF_EACH_FAMILY[family]), tmp_path / "hf", expansion=Expansion.at(2, 5))
    with caplog.at_level("WARNING"):
        load(tmp_path / "hf")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert caplog.records == []
    assert tokenizer.decode(tokenizer("Hello").input_ids) == "Hello"


@pytest.mark.parametrize("family", ONE_OF_EACH_FAMILY)
def test_decoding_with_a_cache_equals_decoding_without(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """Every block has its own cache, added ones too; the added blocks first get weights that matter."""
    expand_hf(tiny_model(**ONE_OF_EACH_FAMILY[family]), tmp_path / "hf", expansion=Expansion.at(2, 5))
    model = load(tmp_path / "hf")
    with torch.no_grad():
        for layer in (2, 5):
            for name, parameter in model.model.layers[layer].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(layer))
    start = some_tokens()[:, :8]
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(start)
    cached = model.generate(start, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(start, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-5)


def ours(folder: Path) -> torch.Tensor:
    """Return the logits of our own forward pass."""
    with SourceFiles() as files:
        return reference_logits(OpenTensors(open_checkpoint(folder), files), some_tokens())


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_our_forward_pass_equals_transformers(settings: dict, tiny_model: Tiny) -> None:
    """`checkpoint.reference` computes in float32 what `transformers` computes."""
    source = tiny_model(**settings)
    theirs = logits_of(load(source).float())
    torch.testing.assert_close(ours(source), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ONE_OF_EACH_FAMILY)
def test_our_forward_pass_reads_either_format(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**ONE_OF_EACH_FAMILY[family])
    hf_to_megatron(source, tmp_path / "megatron")
    assert torch.equal(ours(source), ours(tmp_path / "megatron"))


@pytest.mark.parametrize("settings", [s for s in TINY_FAMILIES.values() if s.get("sliding_window")])
def test_the_sliding_window_changes_the_logits_of_these_tests(settings: dict, tiny_model: Tiny) -> None:
    """The test sequences are longer than the window, so dropping it changes the function."""
    model = load(tiny_model(**settings))
    with_window = logits_of(model)
    model.config.sliding_window = 1000
    assert (logits_of(model) - with_window)[:, 8:].abs().max() > 1e-2
