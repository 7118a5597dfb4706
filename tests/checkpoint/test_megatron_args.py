"""A config.json that fits a Megatron-LM checkpoint's tensors, but is not what it was saved with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy, megatron_to_hf
from megatron_llamapro.config.errors import CheckpointError

Tiny = Callable[..., Path]

# A field of config.json that no tensor's shape depends on, and the argument that contradicts it.
COPIED = {
    "heads": (
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        "num_attention_heads 4, its config.json makes that 2",
    ),
    "rotary base": (
        {"rope_theta": 1e6, "rope_parameters": None},
        "rotary_base 500000, its config.json makes that 1000000",
    ),
    "epsilon": ({"rms_norm_eps": 1e-5}, "norm_epsilon 1e-06, its config.json makes that 1e-05"),
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.fixture(params=["legacy", "torch_dist"])
def foreign(request: pytest.FixtureRequest, tiny_llama: Tiny, tmp_path: Path) -> Path:
    """A checkpoint with Megatron-LM's arguments, and without a manifest."""
    hf_to_megatron(tiny_llama(**ROPE), tmp_path / "legacy", kind=legacy())
    if request.param == "torch_dist":
        hf_to_megatron(tiny_llama(**ROPE), tmp_path / "torch_dist")
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(tmp_path / "legacy/release/mp_rank_00/model_optim_rng.pt", weights_only=True)
        common = torch.load(tmp_path / "torch_dist" / "common.pt", weights_only=True)
        torch.save({**common, "args": saved["args"]}, tmp_path / "torch_dist" / "common.pt")
    (tmp_path / request.param / "llamapro.json").unlink()
    return tmp_path / request.param


def set_fields(folder: Path, fields: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(("fields", "message"), COPIED.values(), ids=COPIED.keys())
def test_what_it_was_saved_with_contradicts_it(fields: dict, message: str, foreign: Path, tmp_path: Path) -> None:
    megatron_to_hf(foreign, tmp_path / "right")
    set_fields(foreign, fields)
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(foreign, tmp_path / "wrong")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "wrong").exists()


def test_a_base_that_is_no_whole_number_is_kept(tiny_llama: Tiny, tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}
    hf_to_megatron(tiny_llama(**rope), tmp_path / "it", kind=legacy())
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(tmp_path / "it/release/mp_rank_00/model_optim_rng.pt", weights_only=True)
    assert saved["args"].rotary_base == 10000.5
