"""Published configurations: our reading equals the model that transformers builds, and docs/models.md lists them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from models_page import PAGE, tables, with_tables
from public_models import MODELS, PublicModel
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_llamapro.checkpoint.formats.hf_tensors import HeaderEntry, named
from megatron_llamapro.checkpoint.tensors.weight_map import hf_shapes
from megatron_llamapro.families.hf_config import model_shape
from megatron_llamapro.families.rotary import inverse_frequencies


def names_of(model: PublicModel) -> str:
    return model.names


@pytest.mark.parametrize("model", MODELS, ids=names_of)
def test_shapes_and_frequencies_are_those_of_transformers(model: PublicModel) -> None:
    shape = model_shape(model.config)
    config = AutoConfig.for_model(**copy.deepcopy(model.config))  # a copy, because it writes into rope_scaling
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    stored = {name: tensor for name, tensor in theirs.state_dict().items() if name not in theirs.all_tied_weights_keys}
    entries = {name: HeaderEntry("BF16", tuple(tensor.shape), Path(), 0) for name, tensor in stored.items()}
    assert {name: entry.shape for name, entry in named(entries, shape).items()} == hf_shapes(shape)
    rotary = type(theirs.model.rotary_emb)(config=config)
    torch.testing.assert_close(inverse_frequencies(shape), rotary.inv_freq, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == 1
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * shape.num_layers
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [shape.window_of(layer) for layer in range(shape.num_layers)] == windows


@pytest.mark.parametrize("model", [model for model in MODELS if model.billions], ids=names_of)
def test_parameter_counts_are_the_published_ones(model: PublicModel) -> None:
    """A wrong field in a row would change the count."""
    count = sum(math.prod(size) for size in hf_shapes(model_shape(model.config)).values())
    assert float(f"{count / 1e9:.3g}") == model.billions


def test_the_page_lists_supported_and_refused_models() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "python tests/families/models_page.py rewrites it"
    read, refused = tables()
    assert len(read) > 75 and len(refused) > 40
