"""The weight map describes how megatron.core divides every weight over tensor-parallel ranks: compared with its
modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.checkpoint.tensors.weight_map import Sharding, Weight
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def share(weight: Weight, whole: torch.Tensor, *, rank: int, ranks: int) -> torch.Tensor:
    """Return a rank's part of a matrix or vector, according to the weight map."""
    if weight.row.sharding is Sharding.REPLICATED:
        return whole
    if weight.row.sharding is Sharding.COLUMNS:
        return whole.chunk(ranks, dim=1)[rank]
    parts = [whole]
    if weight.row.sharding is Sharding.ROWS_BY_PART:
        parts = whole.chunk(len(weight.row.hugging_face))
    return torch.cat([part.chunk(ranks)[rank] for part in parts])


def wrong_parts(folder: Path) -> list[str]:
    """Return this rank's parameters whose values or marks differ from the weight map's part."""
    from megatron_llamapro.checkpoint.tensors.weight_map import weights_of
    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.testing.checkpoints import read_with_torch
    from megatron_llamapro.training.checkpoints.state import load_model, model_state

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    layout = start_model_parallel(parallel, seed=1)
    shape = model_shape(read_hf_config(folder))
    settings = ModelConfig(checkpoint="", make_vocab_size_divisible_by=1)
    chunks = build_model(shape, model=settings, parallel=parallel, precision="fp32")
    load_model(chunks, SmallFiles(folder))
    weights = {weight.megatron_name: weight for weight in weights_of(shape)}
    tensors = read_with_torch(folder)
    wrong, seen = [], set()
    for name, held in model_state(chunks)["model0"].items():
        weight = weights[held.key]
        seen.add(held.key)
        expert = EXPERT.search(name)
        whole = tensors[held.key][int(expert.group(1))] if expert else tensors[held.key]
        expected = share(weight, whole, rank=layout.tensor_rank, ranks=2)
        is_divided = weight.row.sharding is not Sharding.REPLICATED
        dimension = {Sharding.REPLICATED: -1, Sharding.COLUMNS: 1}.get(weight.row.sharding, 0)
        marks = (getattr(held.data, "tensor_model_parallel", False), getattr(held.data, "partition_dim", -1))
        if not torch.equal(held.data, expected) or marks != (is_divided, dimension):
            wrong.append(name)
    return wrong + [f"{name} is not in the model" for name in weights if name not in seen]


@pytest.mark.parametrize("family", ["llama, biases", "qwen2", "qwen3", "mixtral"])
def test_the_modules_hold_the_parts_of_the_weight_map(family: str, tiny_model: Callable, tmp_path: Path) -> None:
    from megatron_llamapro.checkpoint.convert import hf_to_megatron

    source = tiny_model(**TINY_FAMILIES[family], num_hidden_layers=1, vocab_size=132)
    hf_to_megatron(source, tmp_path / "megatron")
    assert run_distributed(wrong_parts, 2, tmp_path / "megatron") == [[], []]
