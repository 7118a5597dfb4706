"""torch_dist and megatron.core's own models of its own layers: they find every key they ask for, and we read their
saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.convert import hf_to_megatron, megatron_to_megatron
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles, check_loadable
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]


@dataclass(frozen=True)
class Stock:
    """A tiny model, and the kind of experts that megatron.core builds for it."""

    settings: dict
    moe_grouped_gemm: bool = False
    """Whether all experts share one parameter (`GroupedMLP`); otherwise each expert is a module."""


MODELS = {
    "llama, tied": Stock({"tie_word_embeddings": True}),
    **{family: Stock(TINY_FAMILIES[family]) for family in ("llama, biases", "qwen2", "qwen3", "mixtral")},
    "mixtral, grouped": Stock(TINY_FAMILIES["mixtral"], moe_grouped_gemm=True),
}
LAYOUTS = {
    "one process": ParallelConfig(),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
}
VOCABULARY = 132  # needs no padding


def stock_model(folder: Path, parallel: ParallelConfig, *, moe_grouped_gemm: bool) -> torch.nn.Module:
    """Build this rank's part of a GPTModel of megatron.core's local layers, filled with NaN."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import grouped_gemm_util

    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.model.build import transformer_config

    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None  # no kernels needed: nothing is computed
    shape = model_shape(read_hf_config(folder))
    config = transformer_config(shape, parallel=parallel, precision="fp32", transformer_impl="local")
    config.hetereogenous_dist_checkpoint = False  # Megatron-LM leaves it unset; the checkpoint's metadata decides
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=shape.num_moe_experts,
            moe_grouped_gemm=moe_grouped_gemm,
            moe_use_legacy_grouped_gemm=moe_grouped_gemm,
            qk_layernorm=shape.qk_layernorm,
            normalization="RMSNorm",
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


def load_stock(
    source: Path, parallel: ParallelConfig, grouped: bool, saved: Path | None = None
) -> tuple[set[str], set[str], list[str]]:
    """Load as Megatron-LM does, then save under `saved`. Return three lists: keys only in the checkpoint, keys only in
    the model, and parameters that were not filled."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_llamapro.runtime.distributed import start_model_parallel

    start_model_parallel(parallel, seed=1)
    model = stock_model(source, parallel, moe_grouped_gemm=grouped)
    metadata = dist_checkpointing.load_content_metadata(str(source))
    wanted = model.sharded_state_dict(metadata=metadata)
    loaded, only_stored, only_asked_for = dist_checkpointing.load(wanted, str(source), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict({name: loaded[name] for name in wanted}, strict=True)
    if saved is not None:
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(saved), content_metadata=metadata)
    unfilled = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    return only_stored, only_asked_for, unfilled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_stock_models_find_every_key_they_ask_for(name: str, layout: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """No key is left over, except one norm stored under two keys: local expert layers name it as dense layers do,
    Transformer Engine's do not."""
    model, parallel = MODELS[name], LAYOUTS[layout]
    source = tiny_model(**model.settings, vocab_size=VOCABULARY)
    hf_to_megatron(source, tmp_path / "it", expansion=Expansion.at(2, 5))
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    ranks = run_distributed(load_stock, world_size, tmp_path / "it", parallel, model.moe_grouped_gemm)
    twice = {f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in range(6)}
    expected = twice if model.settings.get("model_type") == "mixtral" else set()
    assert ranks == [(expected, set(), [])] * world_size


@pytest.mark.parametrize("kind", ["llama, biases", "mixtral", "mixtral, grouped"])
def test_saves_of_stock_models_are_read(kind: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """They equal the loaded checkpoint bit for bit. Training accepts them or says how to convert them."""
    model, saved = MODELS[kind], tmp_path / "saved"
    source = tiny_model(**model.settings, vocab_size=VOCABULARY)
    hf_to_megatron(source, tmp_path / "it")
    saved.mkdir()
    run_distributed(load_stock, 1, tmp_path / "it", LAYOUTS["one process"], model.moe_grouped_gemm, saved)
    shutil.copy(source / "config.json", saved)
    ours, theirs = read_tensors(source), read_tensors(saved)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    if "mixtral" not in kind:
        check_loadable(SmallFiles(saved))
        return
    with pytest.raises(CheckpointError, match=r"has .*layer_norm_weight, but training asks for .*pre_mlp_layernorm"):
        check_loadable(SmallFiles(saved))
    megatron_to_megatron(saved, tmp_path / "converted")
    check_loadable(SmallFiles(tmp_path / "converted"))
