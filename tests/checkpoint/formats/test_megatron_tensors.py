"""megatron.core saves layers stacked by default; they are read layer by layer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_llamapro.checkpoint.convert import hf_to_megatron, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.formats.megatron_tensors import DividedTensor, SavedPart, is_stacked, unstacked
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles, check_loadable
from megatron_llamapro.checkpoint.formats.torch_dist_index import read_index
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.checkpoint.tensors.layout import StoredTensor
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, read_whole
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import edit_dist_index, read_tensors, stack_layers
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]
Cut = tuple[tuple[int, int], ...]

DIVISIONS = {
    "one rank": {},
    "tp 2, pp 2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
MODELS = {"llama": {}, "qwen2": TINY_FAMILIES["qwen2"], "mixtral": TINY_FAMILIES["mixtral"]}


def save_stacked(source: Path, folder: Path, division: dict) -> None:
    """Save megatron.core's own model of its own layers with the weights of `source`, plus training state: a moment of
    every weight and a random state. Its linears add extra states."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.training.checkpoints.state import load_model

    parallel = ParallelConfig(**division)
    start_model_parallel(parallel, seed=1)
    shape = model_shape(read_hf_config(source))
    (filled,) = build_model(shape, model=ModelConfig(checkpoint=""), parallel=parallel, precision="fp32")
    load_model([filled], SmallFiles(source))
    filled.config.hetereogenous_dist_checkpoint = False
    model = GPTModel(
        filled.config,
        get_gpt_layer_local_spec(num_experts=shape.num_moe_experts, normalization="RMSNorm"),
        filled.vocab_size,
        filled.max_sequence_length,
        pre_process=filled.pre_process,
        post_process=filled.post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
    )
    model.load_state_dict(filled.state_dict())
    state = model.sharded_state_dict()
    apply_factories(state)
    moments = [value for parts in state.values() for value in _tensors(parts) if isinstance(value, ShardedTensor)]
    optimizer = [dataclasses.replace(value, key=f"optimizer.state.exp_avg.{value.key}") for value in moments]
    rank = torch.distributed.get_rank()
    rng = ShardedObject("rng_state", [torch.get_rng_state()], (1,), (0,), replica_id=rank)
    dist_checkpointing.save({"model": state, "optimizer": optimizer, "rng_state": rng, "iteration": 3}, str(folder))


def _tensors(value: object) -> list:
    """Flatten; a gate with its up projection is a list made from one tensor."""
    return value if isinstance(value, list) else [value]


def resave_stacked(source: Path, folder: Path, division: dict) -> None:
    folder.mkdir()
    run_distributed(save_stacked, math.prod(division.values()), source, folder, division)
    shutil.copy(source / "config.json", folder)


@pytest.fixture(scope="module")
def stacked(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a checkpoint saved by megatron.core with its config.json; do not change it."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, division: str) -> Path:
        if (model, division) not in made:
            folder = made[model, division] = tmp_path_factory.mktemp("stacked")
            hf_to_megatron(tiny_model(**MODELS[model]), folder / "source")
            resave_stacked(folder / "source", folder / "saved", DIVISIONS[division])
        return made[model, division] / "saved"

    return make


def same(one: Path, other: Path) -> bool:
    left, right = read_tensors(one), read_tensors(other)
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("division", DIVISIONS)
def test_stacked_layers_are_read(
    division: str, model: str, stacked: Callable, tiny_model: Tiny, tmp_path: Path
) -> None:
    source, folder = tiny_model(**MODELS[model]), stacked(model, division)
    index = read_index(folder)
    assert sum(map(is_stacked, index)) >= 6
    assert not any(name.startswith("decoder.layers.0.") for name in index)
    assert "optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight" in index
    assert b"linear_qkv._extra_state/shard_0_4" in (folder / ".metadata").read_bytes()
    megatron_to_hf(folder, tmp_path / "hf")
    assert same(tmp_path / "hf", source)
    assert inspect(folder).shape.num_layers == 4


def test_a_stacked_expanded_model_is_verified(tiny_llama: Tiny, tmp_path: Path) -> None:
    """As saved by Megatron-LM from a converted one, with its manifest copied beside it."""
    hf_to_megatron(tiny_llama(), tmp_path / "source", expansion=Expansion.at(2, 5))
    resave_stacked(tmp_path / "source", tmp_path / "saved", DIVISIONS["tp 2, pp 2"])
    shutil.copy(tmp_path / "source" / "llamapro.json", tmp_path / "saved")
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "saved"))


@pytest.mark.parametrize("model", MODELS)
def test_expanding_a_stacked_checkpoint_writes_one_key_per_layer(
    model: str, stacked: Callable, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = stacked(model, "tp 2, pp 2")
    megatron_to_megatron(folder, tmp_path / "expanded", expansion=Expansion.at(1, 4))
    assert not any(map(is_stacked, read_index(tmp_path / "expanded")))
    assert inspect(tmp_path / "expanded").plan.added_layers == (1, 4)
    assert all(check.ok for check in verify(tiny_model(**MODELS[model]), tmp_path / "expanded"))


def test_stacks_stored_in_one_piece_are_read(tiny_model: Tiny, tmp_path: Path) -> None:
    """Other programs may save them this way."""
    source = tiny_model(**MODELS["mixtral"])
    hf_to_megatron(source, tmp_path / "megatron")
    stack_layers(tmp_path / "megatron", tmp_path / "stacked")
    assert all(check.ok for check in verify(source, tmp_path / "stacked", quick=True))


def test_training_refuses_a_stacked_checkpoint_with_advice(stacked: Callable, tmp_path: Path) -> None:
    folder = stacked("llama", "one rank")
    with pytest.raises(CheckpointError, match=r"layers stacked.*megatron-to-megatron"):
        check_loadable(SmallFiles(folder))
    megatron_to_megatron(folder, tmp_path / "converted")
    check_loadable(SmallFiles(tmp_path / "converted"))


NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


def of_layer(layer: int) -> MetadataIndex:
    return MetadataIndex(NORM, torch.Size([layer, 0]))


def lose_a_layer(index) -> None:
    index.state_dict_metadata[NORM].chunks.pop(2)


def have_a_layer_twice(index) -> None:
    index.state_dict_metadata[NORM].chunks[2].offsets = torch.Size([1, 0])


def save_a_layer_by_itself_too(index) -> None:
    name = NORM.replace("layers.", "layers.0.")
    index.state_dict_metadata[name] = index.state_dict_metadata["decoder.final_layernorm.weight"]
    place = index.storage_data[MetadataIndex("decoder.final_layernorm.weight", torch.Size([0]))]
    index.storage_data[MetadataIndex(name, torch.Size([0]))] = place


def stack_another_number(index) -> None:
    """Change the stack of one weight only."""
    entry = index.state_dict_metadata[NORM]
    entry.size = torch.Size([3, 64])
    entry.chunks.pop()


DAMAGED = {
    "a layer is missing": (lose_a_layer, f"{NORM} is not complete"),
    "a layer in another's place": (have_a_layer_twice, "layers.1.mlp.linear_fc1.layer_norm_weight overlap or leave"),
    "a layer by itself too": (save_a_layer_by_itself_too, "layers.0.mlp.linear_fc1.layer_norm_weight twice"),
    "another number of layers": (stack_another_number, r"\(3, 64\): it is not a stack of the 4 layers of config.json"),
    "a weight is missing": (lambda index: index.state_dict_metadata.pop(NORM) and None, "lacks the tensor decoder"),
    "a place is missing": (lambda index: index.storage_data.pop(of_layer(1)) and None, "metadata is damaged"),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_one_line(edit: Callable, message: str, stacked: Callable, tmp_path: Path) -> None:
    folder = shutil.copytree(stacked("llama", "one rank"), tmp_path / "damaged")
    edit_dist_index(folder, edit)
    with pytest.raises(CheckpointError, match=message) as refusal:
        megatron_to_hf(folder, tmp_path / "hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("num_layers", [3, 5])
def test_another_number_of_layers_in_config_json_is_refused(num_layers: int, stacked: Callable, tmp_path: Path) -> None:
    folder = shutil.copytree(stacked("llama", "one rank"), tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    with pytest.raises(CheckpointError, match=f"it is not a stack of the {num_layers} layers of config.json"):
        megatron_to_hf(folder, tmp_path / "hf")


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Cut `length` into spans."""
    points = sorted(draw(st.sets(st.integers(1, length - 1), max_size=2))) if length > 1 else []
    return list(itertools.pairwise([0, *points, length]))


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from([(4, 6), (3, 4, 5), (2, 3, 4, 5)]))
def test_a_stack_cut_at_any_place_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: Cut
) -> None:
    """Vectors, matrices and experts; a part may hold several layers or a portion of one."""
    whole = numpy.arange(math.prod(shape), dtype=numpy.uint32).reshape(shape)
    file = tmp_path_factory.getbasetemp() / "stack"
    parts, stored = [], b""
    for spans in itertools.product(*(data.draw(cuts(size)) for size in shape)):
        values = whole[tuple(slice(*span) for span in spans)]
        parts.append(SavedPart(tuple(start for start, _ in spans), values.shape, file, len(stored)))
        stored += values.tobytes()
    file.write_bytes(stored)
    stack = {"decoder.layers.a.b": DividedTensor(shape, "float32", tuple(parts))}
    layers = unstacked(stack, num_layers=shape[0], where=file)
    assert layers.keys() == {f"decoder.layers.{layer}.a.b" for layer in range(shape[0])}
    with SourceFiles() as files:
        for layer, expected in enumerate(whole):
            held = layers[f"decoder.layers.{layer}.a.b"]
            rows = (expected.size // expected.shape[-1], expected.shape[-1]) if expected.ndim > 1 else expected.shape
            tensor = StoredTensor(rows, tuple(held.pieces()))
            assert read_whole(tensor, files, 4).tobytes() == expected.tobytes()
