"""We read a config.json as transformers does, or refuse it: frequencies, shapes and logits, over every field that is
read. `FUZZ_EXAMPLES=5000 make fuzz` tries more."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config_cases import BASE, FAMILIES, drawn_config, rope_configs
from config_difference import OurReading
from fuzzing import IS_LONG, fuzz_settings
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import model_shape, spelled_for_all
from transformers_reading import reading

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about many of these


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: for tiny models on a busy machine, threads wait longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("turn", range(len(FAMILIES)), ids=FAMILIES)
def test_combinations_of_rotary_fields_read_as_transformers_does(turn: int) -> None:
    """A fifth per family, or all of every family in `make fuzz`. Also in the spelling of our exports."""
    accepted = 0
    step = 1 if IS_LONG else len(FAMILIES)
    for config in list(rope_configs(FAMILIES[turn]))[turn % step :: step]:
        ours = OurReading.of(config)
        if ours is None:
            continue
        accepted += 1
        spelled = spelled_for_all(config)
        assert OurReading.of(spelled) == ours
        for one in [config] if spelled == config else [config, spelled]:
            assert ours.difference(reading(copy.deepcopy(one), None)) is None, one
    assert accepted > 50


@fuzz_settings(100)
@given(data=st.data())
def test_any_fields_read_as_transformers_does(data: st.DataObject) -> None:
    config = drawn_config(lambda values: data.draw(st.sampled_from(values)))
    ours = OurReading.of(config)
    if ours is not None:
        difference = ours.difference(reading(copy.deepcopy(config), ours.shapes))
        assert difference is None, f"{difference}: {config}"


LLAMA = {"model_type": "llama", **BASE}
LINEAR = {"rope_type": "linear", "factor": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NEWER = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}

REFUSED = {
    "two spellings, one scaled": (
        {**NEWER, "rope_scaling": LINEAR},
        "type linear with factor 4 in rope_scaling but unscaled rotary embeddings in rope_parameters: versions",
    ),
    "two spellings, another base": (
        {**NEWER, "rope_scaling": {"rope_type": "default"}},
        "rope_theta 500000 in rope_parameters, but transformers 5 reads 10000",
    ),
    "two spellings, one not known": ({**NEWER, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, "type 'yarn'"),
    "a base at top level that 5 does not read": ({**NEWER, "rope_theta": 1e6}, "rope_theta 1e.06 in its top level"),
    "a base in rope_scaling that 4 does not read": (
        {"rope_theta": 1e4, "rope_scaling": {**LINEAR, "rope_theta": 5e5}},
        "rope_theta 10000 in its top level, but transformers 5 reads 500000",
    ),
    "two types": ({"rope_scaling": {**LINEAR, "type": "llama3"}}, "rope_type 'linear' and type 'llama3'"),
    "two original lengths": (
        {
            "original_max_position_embeddings": 8,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16},
        },
        "original_max_position_embeddings 8 at top level, 16 in rope_scaling",
    ),
    "a base of null": ({"rope_parameters": {**LINEAR, "rope_theta": None}}, "rope_theta null"),
    "a base of null at top level": ({"rope_theta": None}, "rope_theta null"),
    "rotary embeddings a layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
        "separate fields for 'full_attention'",
    ),
    "half of a head turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "half of a head turned, inside": (
        {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
        "rope_parameters has partial_rotary_factor 0.5",
    ),
    "both directions": ({"is_causal": False}, "is_causal False"),
    "a mistral that transformers 4.57 reads as a ministral": (
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "4.57 and later read a mistral that has it as a ministral",
    ),
    "a mistral that it takes for one too": ({"model_type": "mistral", "layer_types": None}, "layer_types null"),
    "experts counted twice": (
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts": 4},
        "num_local_experts 8, num_experts 4",
    ),
    "an epsilon of null": ({"rms_norm_eps": None}, "rms_norm_eps None"),
    "a size of heads that is null": ({"model_type": "qwen3", "head_dim": None}, "head_dim null"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_fields_that_versions_read_differently_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        model_shape({**LLAMA, **fields})
    assert "\n" not in str(refusal.value)


def test_a_missing_number_of_groups_is_the_familys_default() -> None:
    """Qwen2's default is 32 for any number of heads."""
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    with pytest.raises(CheckpointError, match="num_key_value_heads 32"):
        model_shape({**config, "model_type": "qwen2"})
    assert model_shape(config).num_query_groups == BASE["num_attention_heads"]


SPELLED = {
    "the newer alone": (NEWER, {"rope_theta": 5e5, "rope_scaling": None}),
    "the newer alone, scaled": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 16}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    ),
    "a base inside the older": (
        {"rope_scaling": {**LINEAR, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LINEAR},
    ),
    "an original length at top level": (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_theta": 1e4, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    ),
    "the older": ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, {}),
    "none": ({}, {}),
    "the newer with what is the default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, {}),
}


@pytest.mark.parametrize(("fields", "added"), SPELLED.values(), ids=SPELLED.keys())
def test_an_export_adds_the_older_spelling_if_needed(fields: dict, added: dict) -> None:
    config = {**LLAMA, **fields}
    assert spelled_for_all(config) == {**config, **added}
