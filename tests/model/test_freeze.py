"""What trains, by global layer, on every stage of every layout."""

from __future__ import annotations

import pytest

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.families import ModelShape
from megatron_llamapro.testing.distributed import run_distributed

SHAPE = ModelShape(
    num_layers=12,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=131,
    layernorm_epsilon=1e-5,
    max_position_embeddings=64,
    rotary_base=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
)
PLAN = ExpansionPlan.unexpanded(10).expand((1, 11))  # 1 is the start of 11's name: names are not matched by their start


def freeze_worker(parallel: ParallelConfig, trainable: tuple[str, ...], tied: bool):
    """Names of what trains on this rank, and the report."""
    import dataclasses

    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.model.freeze import freeze
    from megatron_llamapro.model.names import named_parameters
    from megatron_llamapro.runtime.distributed import start_model_parallel

    layout = start_model_parallel(parallel, seed=1)
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    model = ModelConfig(checkpoint="")
    chunks = build_model(shape, model=model, parallel=parallel, precision="fp32")
    report = freeze(chunks, PLAN, trainable, tie_word_embeddings=tied, tensor_size=layout.tensor_size)
    return {named.name for named in named_parameters(chunks) if named.parameter.requires_grad}, report


def trained(parallel: ParallelConfig, *trainable: str, tied: bool = False) -> set[str]:
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return set().union(*(names for names, _ in run_distributed(freeze_worker, world_size, parallel, trainable, tied)))


BLOCK = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
ADDED = {f"decoder.layers.{layer}.{name}" for layer in (1, 11) for name in BLOCK}

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "pp3 uneven": ParallelConfig(pipeline_model_parallel_size=3, pipeline_stage_layers=(2, 3, 7)),
    "pp2 virtual 3": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_blocks_and_nothing_else(layout: str) -> None:
    assert trained(LAYOUTS[layout], "added_blocks") == ADDED


def test_named_parts() -> None:
    one = LAYOUTS["one"]
    assert trained(one, "linear_fc2", "final_norm") == {
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.11.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
    }
    assert trained(one, "added_blocks", "embedding", "output_layer") == ADDED | {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }


def test_tied_embedding_trains_on_both_stages() -> None:
    """The last stage's copy is named output_layer.weight by megatron.core."""
    pp2 = ParallelConfig(pipeline_model_parallel_size=2)
    assert trained(pp2, "embedding", tied=True) == {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert trained(pp2, "added_blocks", tied=True) == ADDED


def test_report_counts_every_parameter_once() -> None:
    parallel = LAYOUTS["tp2 pp2"]
    ranks = run_distributed(freeze_worker, 4, parallel, ("added_blocks",), False)
    [(_, whole)] = run_distributed(freeze_worker, 1, LAYOUTS["one"], ("added_blocks",), False)
    stages = [ranks[0][1], ranks[2][1]]
    assert sum(stage.num_stage_trainable for stage in stages) == whole.num_trainable
    assert [stage.trainable_layers for stage in stages] == [(1,), (11,)]
    assert whole.gradient_bytes == 4 * whole.num_trainable and whole.optimizer_bytes == 8 * whole.num_trainable


def test_refusals() -> None:
    from megatron_llamapro.model.freeze import check_trainable

    unexpanded = ExpansionPlan.unexpanded(2)
    for trainable, plan, tied, message in (
        (("added_block",), PLAN, False, "did you mean 'added_blocks'"),
        (("added_blocks",), unexpanded, False, "has no added blocks"),
        (("linear_fc1",), unexpanded, False, "has no added blocks"),
        (("output_layer",), PLAN, True, "name 'embedding'"),
        (("xyz",), PLAN, False, "it is one of added_blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_trainable(trainable, plan, tie_word_embeddings=tied)
