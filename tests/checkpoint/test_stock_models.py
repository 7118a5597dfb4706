"""torch_dist: megatron.core's own models, of its own layers, find every key that they ask for, and what they save is
read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.convert import hf_to_megatron
from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]

MODELS = {
    "llama, tied": {"tie_word_embeddings": True},
    **{family: TINY_FAMILIES[family] for family in ("llama, biases", "qwen2", "qwen3", "mixtral")},
}
LAYOUTS = {
    "one process": ParallelConfig(),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
}
COMMON = ("content_metadata", "checkpoint_version", "iteration")
VOCABULARY = 132  # which needs no padding here


def stock_model(folder: Path, parallel: ParallelConfig) -> torch.nn.Module:
    """This rank's part of a GPTModel of megatron.core's local layers, filled with NaN."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_llamapro.model.build import transformer_config
    from megatron_llamapro.model.families import model_shape, read_hf_config

    shape = model_shape(read_hf_config(folder))
    config = transformer_config(shape, parallel=parallel, precision="fp32", transformer_impl="local")
    config.hetereogenous_dist_checkpoint = False  # what Megatron-LM does not set
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=shape.num_moe_experts, qk_layernorm=shape.qk_layernorm, normalization="RMSNorm"
        ),
        VOCABULARY,
        shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    return model


def load_stock(folder: Path, parallel: ParallelConfig) -> tuple[set[str], set[str], list[str]]:
    """Keys that only the checkpoint has; that only the model has; parameters that are not those of our model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.model.families import model_shape, read_hf_config
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.training.checkpointing import load_model

    start_model_parallel(parallel, seed=1)
    model = stock_model(folder, parallel)
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    state, *different = dist_checkpointing.load(
        model.sharded_state_dict(metadata=metadata), str(folder), strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict({name: value for name, value in state.items() if name not in COMMON}, strict=True)
    shape, settings = model_shape(read_hf_config(folder)), ModelConfig(checkpoint="", make_vocab_size_divisible_by=1)
    [ours] = build_model(shape, model=settings, parallel=parallel, precision="fp32")
    load_model([ours], folder)
    expected = dict(ours.named_parameters())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    wrong = [name for name in parameters if not torch.equal(parameters[name], expected[name])]
    return *different, wrong


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_stock_models_find_all_they_ask_for(settings: dict, layout: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """And nothing is left over, but the one norm that stands under two keys: the local layers of experts call it as
    dense layers do, Transformer Engine's do not."""
    hf_to_megatron(
        tiny_model(**settings, vocab_size=VOCABULARY), tmp_path / "it", expand=lambda plan: plan.expand((2, 5))
    )
    parallel = LAYOUTS[layout]
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    twice = {f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in range(6)}
    left_over = twice if settings.get("model_type") == "mixtral" else set()
    for only_stored, only_asked_for, wrong in run_distributed(load_stock, world_size, tmp_path / "it", parallel):
        assert (only_stored, only_asked_for, wrong) == (left_over, set(), [])


def save_stock(source: Path, target: Path) -> None:
    """What Megatron-LM saves with one key a layer: loaded from `source`."""
    from megatron.core import dist_checkpointing

    from megatron_llamapro.runtime.distributed import start_model_parallel

    parallel = ParallelConfig()
    start_model_parallel(parallel, seed=1)
    model = stock_model(source, parallel)
    metadata = dist_checkpointing.load_content_metadata(str(source))
    state = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(source))
    model.load_state_dict({name: value for name, value in state.items() if name not in COMMON}, strict=True)
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(target), content_metadata=metadata)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_what_stock_models_save_is_read(settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**settings, vocab_size=VOCABULARY)
    hf_to_megatron(source, tmp_path / "it")
    (tmp_path / "saved").mkdir()
    run_distributed(save_stock, 1, tmp_path / "it", tmp_path / "saved")
    shutil.copy(source / "config.json", tmp_path / "saved")
    ours, theirs = read_tensors(source), read_tensors(tmp_path / "saved")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
