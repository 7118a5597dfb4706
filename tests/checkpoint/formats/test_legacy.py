"""legacy checkpoints: every division holds the same model, under Megatron-LM's names and shapes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]
ADDED = Expansion.at(2, 5)  # 4 → 6 layers

DIVISIONS = {
    "one rank": {},
    "tp 2": {"tensor_model_parallel_size": 2},
    "tp 2, pp 2, uneven": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "pipeline_stage_layers": (4, 2),
    },
    "pp 3, Transformer Engine's names": {"pipeline_model_parallel_size": 3, "layer_spec": "transformer_engine"},
    "pp 2, virtual 2, uneven": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_stage_layers": (2, 1, 2, 1),
    },
    "tp 2, pp 2, virtual 3": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 3,
    },
}
MODELS = {
    "untied, bfloat16": {"dtype": "bfloat16"},
    "tied, head_dim": {"tie_word_embeddings": True, "head_dim": 24},
    "qwen2": TINY_FAMILIES["qwen2"],
    "qwen3": TINY_FAMILIES["qwen3"],
    "mixtral": TINY_FAMILIES["mixtral"],
    "biases": TINY_FAMILIES["llama, biases"],
}


def load(path: Path) -> dict:
    """Load a rank's file as Megatron-LM does."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(one: Path, other: Path) -> bool:
    left, right = read_tensors(one), read_tensors(other)
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_division_holds_the_same_model(division: str, model: str, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**MODELS[model])
    hf_to_megatron(source, tmp_path / "it", expansion=ADDED, kind=legacy(**DIVISIONS[division]))
    hf_to_megatron(source, tmp_path / "dist", expansion=ADDED)
    assert same(tmp_path / "it", tmp_path / "dist")
    assert all(check.ok for check in verify(source, tmp_path / "it", quick=True))


def test_redividing_and_exporting_keeps_the_model(tiny_llama: Tiny, tmp_path: Path) -> None:
    source, (first, second) = (
        tiny_llama(),
        [DIVISIONS[name] for name in ("tp 2, pp 2, uneven", "tp 2, pp 2, virtual 3")],
    )
    hf_to_megatron(source, tmp_path / "1", expansion=ADDED, kind=legacy(**first))
    megatron_to_megatron(tmp_path / "1", tmp_path / "2", kind=legacy(**second))
    megatron_to_megatron(tmp_path / "2", tmp_path / "3")
    megatron_to_hf(tmp_path / "3", tmp_path / "hf")
    for name in ("2", "3", "hf"):
        assert same(tmp_path / name, tmp_path / "1")
    hf_to_megatron(source, tmp_path / "direct", expansion=ADDED, kind=legacy(**second))
    for path in (tmp_path / "direct").rglob("*.pt"):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "direct")).read_bytes()


def test_a_second_round_expands_a_divided_checkpoint(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "1", expansion=ADDED, kind=legacy(tensor_model_parallel_size=2))
    megatron_to_megatron(tmp_path / "1", tmp_path / "2", expansion=Expansion.at(0, 7))
    assert open_checkpoint(tmp_path / "2").plan.added_layers == (0, 3, 6, 7)
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "2"))


def model_states(config: dict, division: dict) -> dict[str, dict[str, tuple]]:
    """Return name and shape of every state-dict entry, for each chunk of megatron.core's own model on this rank."""
    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.families.hf_config import model_shape
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.runtime.distributed import start_model_parallel

    parallel = ParallelConfig(**division)
    start_model_parallel(parallel, seed=1)
    shape, settings = model_shape(config), ModelConfig(checkpoint="")
    chunks = build_model(shape, model=settings, parallel=parallel, precision="fp32")
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        key: {name: tuple(value.shape) for name, value in chunk.state_dict().items() if isinstance(value, torch.Tensor)}
        for key, chunk in zip(keys, chunks, strict=True)
    }


@pytest.mark.parametrize("model", ["untied", "tied", "qwen2", "qwen3", "mixtral", "biases"])
def test_names_and_shapes_are_those_of_each_ranks_model(model: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """At TP 2 x PP 2 x virtual 2, each file is the state dict of the model that its rank builds."""
    settings = {"untied": {}, "tied": {"tie_word_embeddings": True}, **MODELS}[model]
    division = {**DIVISIONS["pp 2, virtual 2, uneven"], "tensor_model_parallel_size": 2}
    hf_to_megatron(tiny_model(**settings), tmp_path / "it", expansion=ADDED, kind=legacy(**division))
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    ranks = run_distributed(model_states, 4, config, {**division, "sequence_parallel": True})
    for rank, states in enumerate(ranks):
        path = tmp_path / "it" / "release" / f"mp_rank_{rank % 2:02d}_{rank // 2:03d}" / "model_optim_rng.pt"
        stored = load(path)
        for key, state in states.items():
            assert {name: tuple(tensor.shape) for name, tensor in stored[key].items()} == state, (rank, key)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mixtral", {"num_experts": 4, "moe_router_topk": 3, "add_bias_linear": False}),
        ("biases", {"num_experts": None, "moe_router_topk": None, "add_bias_linear": True}),
    ],
)
def test_the_saved_arguments_describe_the_blocks(model: str, expected: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    """With --use-checkpoint-args Megatron-LM builds the model from them, and uses a default for each one that is
    missing."""
    settings = {**MODELS[model], **({"num_experts_per_tok": 3} if model == "mixtral" else {})}
    hf_to_megatron(tiny_model(**settings), tmp_path / "it", kind=legacy())
    arguments = vars(load(tmp_path / "it" / "release" / "mp_rank_00" / "model_optim_rng.pt")["args"])
    assert {name: arguments[name] for name in expected} == expected


REFUSED = {
    "stages that do not make the model": (
        {"pipeline_model_parallel_size": 2, "pipeline_stage_layers": (4, 3)},
        "stages of 4, 3 layers do not fit a model of 6 layers",
    ),
    "counts that are too few": (
        {"pipeline_model_parallel_size": 3, "pipeline_stage_layers": (4, 2)},
        "has 2 counts for 3",
    ),
    "more stages than layers": ({"pipeline_model_parallel_size": 7}, "6 layers, fewer than the 7"),
    "chunks of one stage": ({"virtual_pipeline_model_parallel_size": 2}, "interleaved schedule needs at least 2"),
    "one chunk a stage": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1},
        "interleaved schedule needs at least 2",
    ),
    "heads that do not divide": ({"tensor_model_parallel_size": 4}, "2 query groups cannot be divided"),
}


@pytest.mark.parametrize(("division", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_division_is_refused(division: dict, message: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(tiny_llama(), tmp_path / "it", expansion=ADDED, kind=legacy(**division))
    assert list(tmp_path.iterdir()) == []


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def rank_file(folder: Path) -> Path:
    return folder / "release" / "mp_rank_01_001" / "model_optim_rng.pt"


def resave(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a rank's file and save it again with torch."""
    state = load(rank_file(folder))
    change(state)
    torch.save(state, rank_file(folder))


NORM = "decoder.layers.0.input_layernorm.weight"
DAMAGED = {
    "a rank is missing": (lambda f: rank_file(f).unlink(), "has no model_optim_rng.pt"),
    "a rank's folder is missing": (
        lambda f: (rank_file(f).unlink(), rank_file(f).parent.rmdir()),
        "lacks tensor rank 1 of stage 1",
    ),
    "a truncated file": (lambda f: rank_file(f).write_bytes(rank_file(f).read_bytes()[:-500]), "was not loaded"),
    "a missing tensor": (lambda f: resave(f, lambda s: s["model"].pop(NORM)), f"lacks the tensor {NORM}"),
    "an unknown tensor": (
        lambda f: resave(f, lambda s: s["model"].update({"decoder.layers.0.mlp.x": torch.zeros(1)})),
        "has the tensor decoder.layers.0.mlp.x",
    ),
    "a tensor of the wrong shape": (
        lambda f: resave(f, lambda s: s["model"].update({NORM: torch.zeros(3)})),
        r"input_layernorm.weight has shape \(3,\), not \(64,\)",
    ),
    "no model": (lambda f: resave(f, lambda s: s.pop("model")), "holds no model"),
    "a folder of another name": (
        lambda f: rank_file(f).parent.rename(rank_file(f).parent.with_name("mp_rank_x")),
        "is not a rank's folder",
    ),
}


@pytest.fixture
def divided(tiny_llama: Tiny, tmp_path: Path) -> Path:
    division = DIVISIONS["tp 2, pp 2, uneven"]
    hf_to_megatron(tiny_llama(), tmp_path / "it", expansion=ADDED, kind=legacy(**division))
    return tmp_path / "it"


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_one_line(damage: Callable, message: str, divided: Path, tmp_path: Path) -> None:
    damage(divided)
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(divided, tmp_path / "hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "hf").exists()


def test_a_hostile_file_runs_no_code(divided: Path, tmp_path: Path) -> None:
    state = load(rank_file(divided))
    torch.save({**state, "args": Hostile(tmp_path / "ran")}, rank_file(divided))
    with pytest.raises(CheckpointError, match="was not loaded: it asks for "):
        megatron_to_hf(divided, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]


def test_other_state_of_megatron_lm_is_left_out(divided: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    """Random states, enumerations and extra states are read as inert records."""
    import signal

    import numpy

    def as_trained(state: dict) -> None:
        state["rng_state"] = [{"np_rng_state": numpy.random.get_state(), "rng": torch.get_rng_state()}]
        state["args"] = argparse.Namespace(signal=signal.SIGTERM, params_dtype=torch.bfloat16)
        state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None

    resave(divided, as_trained)
    megatron_to_hf(divided, tmp_path / "hf")
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "hf", quick=True))


def test_a_checkpoint_without_a_manifest_was_never_expanded(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Megatron-LM's own checkpoints are read this way once a config.json lies beside them."""
    hf_to_megatron(tiny_llama(), tmp_path / "it", kind=legacy(tensor_model_parallel_size=2))
    (tmp_path / "it" / "llamapro.json").unlink()
    megatron_to_hf(tmp_path / "it", tmp_path / "hf")
    assert same(tmp_path / "hf", tiny_llama())


def test_more_than_ten_chunks_keep_their_order(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama(num_hidden_layers=24, hidden_size=32, intermediate_size=32)
    division = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 12}
    hf_to_megatron(source, tmp_path / "it", kind=legacy(**division))
    assert same(tmp_path / "it", source)


def test_a_huge_rank_number_allocates_no_memory(divided: Path, tmp_path: Path) -> None:
    """The number comes from a folder name."""
    (divided / "release" / "mp_rank_00_000").rename(divided / "release" / "mp_rank_9999999999_000")
    with pytest.raises(CheckpointError, match="lacks tensor rank 0 of stage 0"):
        megatron_to_hf(divided, tmp_path / "hf")


def test_a_link_out_of_the_checkpoint_is_not_followed(divided: Path, tmp_path: Path) -> None:
    rank = divided / "release" / "mp_rank_00_000"
    rank.rename(tmp_path / "outside")
    rank.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        megatron_to_hf(divided, tmp_path / "hf")
