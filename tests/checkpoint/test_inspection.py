"""Inspection reports a checkpoint from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, legacy
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.inspection import drawing, inspect
from megatron_llamapro.expansion.plan import ExpansionPlan, placed_positions
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]


def test_drawings_show_the_placement_of_each_round() -> None:
    plan = ExpansionPlan.unexpanded(8).expand(placed_positions(8, 2))
    assert drawing(plan, tie_word_embeddings=False) == "E o o o o A o o o o A H"
    assert drawing(plan.expand((0,)), tie_word_embeddings=True) == "E 2 o o o o 1 o o o o 1 E"


@pytest.mark.parametrize("format_name", ["Hugging Face", "Megatron, torch_dist"])
def test_an_expanded_model_lists_its_parts_and_plan(format_name: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    convert = {"Hugging Face": expand_hf, "Megatron, torch_dist": hf_to_megatron}[format_name]
    convert(tiny_llama(dtype="bfloat16"), tmp_path / "it", expansion=Expansion.at(2, 5))
    found = inspect(tmp_path / "it")
    assert (found.format, found.family, found.dtype, found.source) == (format_name, "llama", "bfloat16", "tiny")
    block = 2 * 64 + 128 * 64 + 64 * 64 + 3 * 96 * 64
    assert {part.name: part.num_parameters for part in found.parts} == {
        "embedding": 131 * 64,
        "original blocks": 4 * block,
        "added blocks": 2 * block,
        "final norm": 64,
        "output layer": 131 * 64,
    }
    assert all(part.num_bytes == 2 * part.num_parameters for part in found.parts)
    assert "E o o A o o A H" in str(found)
    assert found.trains == "added blocks: 61,696 of 201,920 parameters (30.6 %)"
    plain = json.loads(json.dumps(found.to_json()))
    assert (plain["num_layers"], plain["added_layers"]) == (6, [2, 5])
    assert ExpansionPlan.from_json(plain["plan"]) == found.plan


def test_a_legacy_checkpoint_shows_its_stages(tiny_llama: Tiny, tmp_path: Path) -> None:
    division = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "pipeline_stage_layers": (4, 2)}
    hf_to_megatron(tiny_llama(), tmp_path / "it", expansion=Expansion.at(2, 5), kind=legacy(**division))
    shown = str(inspect(tmp_path / "it"))
    assert "TP 2 x PP 2" in shown
    assert "stage 0 │ E o o A o │ 1 │ o A H" in shown


def test_a_model_without_added_blocks_says_so(tiny_llama: Tiny) -> None:
    found = inspect(tiny_llama(tie_word_embeddings=True))
    assert found.source is None
    assert found.trains.startswith("no blocks are added yet")
    assert "E o o o o E" in str(found)


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        ("mistral", ["window          8 tokens in every layer"]),
        (
            "qwen2, tied, window from layer 2",
            ["window          8 tokens in layers 2, 3", "attention       biases of queries, keys and values"],
        ),
        ("qwen3", ["attention       norms of queries and keys"]),
        ("mixtral", ["experts         4 per block, 2 per token"]),
        ("llama, biases", ["biases          of all projections"]),
    ],
)
def test_family_features_have_lines_of_their_own(family: str, lines: list[str], tiny_model: Tiny) -> None:
    found = str(inspect(tiny_model(**TINY_FAMILIES[family]))).splitlines()
    assert [line for line in found if line.startswith(("experts", "window", "attention", "biases"))] == lines


def test_tensors_are_not_read(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Overwrite every tensor; the report stays the same."""
    hf_to_megatron(tiny_llama(), tmp_path / "megatron")
    for tensor in open_checkpoint(tmp_path / "megatron").tensors.values():
        for piece in tensor.pieces:
            with piece.file.open("r+b") as file:
                file.seek(piece.offset)
                file.write(b"\xff" * 4 * piece.num_elements)
    assert inspect(tmp_path / "megatron").shape == inspect(tiny_llama()).shape
