"""The trainable part, by global layer, on every stage of every layout."""

from __future__ import annotations

import pytest

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import LoraConfig, ModelConfig, ParallelConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import tiny_shape

PLAN = ExpansionPlan.unexpanded(10).expand((1, 11))  # 1 starts the name of 11: names must not match by prefix


# 2 → 3 → 5 layers: round 1 added layer 2, round 2 layers 1 and 4.
TWO_ROUNDS = ExpansionPlan.unexpanded(2).expand((1,)).expand((1, 4))


def freeze_worker(
    parallel: ParallelConfig, trainable: tuple[str, ...], tied: bool, plan: ExpansionPlan, fields: dict[str, object]
):
    """Return the names of this rank's trainable parameters, and the report; `fields` change the shape."""
    from megatron_llamapro.expansion.trainable import first_trainable_layer
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.model.freeze import freeze
    from megatron_llamapro.model.names import named_parameters
    from megatron_llamapro.model.skip_frozen import find_first_trainable_layer
    from megatron_llamapro.runtime.distributed import start_model_parallel

    layout = start_model_parallel(parallel, seed=1)
    shape = tiny_shape(tie_word_embeddings=tied, num_layers=plan.num_layers, **fields)
    model = ModelConfig(checkpoint="")
    chunks = build_model(shape, model=model, parallel=parallel, precision="fp32")
    report = freeze(chunks, plan, trainable, tie_word_embeddings=tied, tensor_size=layout.tensor_size)
    assert freeze(chunks, plan, trainable) == report  # the model alone gives the same report
    assert find_first_trainable_layer(chunks) == first_trainable_layer(trainable, plan)
    return {named.name for named in named_parameters(chunks) if named.parameter.requires_grad}, report


def trained(
    parallel: ParallelConfig, *trainable: str, tied: bool = False, plan: ExpansionPlan = PLAN, **fields: object
) -> set[str]:
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    ranks = run_distributed(freeze_worker, world_size, parallel, trainable, tied, plan, fields)
    return set().union(*(names for names, _ in ranks))


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
def test_only_added_blocks_train(layout: str) -> None:
    assert trained(LAYOUTS[layout], "added_blocks") == ADDED


def test_named_parts_train() -> None:
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


def test_one_round_trains_alone() -> None:
    """On every stage. The model's other added blocks keep the weights of an earlier run."""
    pp2 = ParallelConfig(pipeline_model_parallel_size=2)
    for trainable, layers in ((("round_1",), {2}), (("newest_blocks",), {1, 4}), (("round_1", "round_2"), {1, 2, 4})):
        names = trained(pp2, *trainable, plan=TWO_ROUNDS)
        assert names == {f"decoder.layers.{layer}.{name}" for layer in layers for name in BLOCK}


def test_trainable_layers_follow_the_names() -> None:
    from megatron_llamapro.expansion.trainable import trainable_layers

    for trainable, layers in (
        (("added_blocks",), {1, 2, 4}),
        (("round_1", "final_norm"), {2}),
        (("newest_blocks",), {1, 4}),
        (("newest_blocks", "linear_fc1"), {1, 2, 4}),
        (("embedding",), set()),
        (("everything",), {0, 1, 2, 3, 4}),
    ):
        assert trainable_layers(trainable, TWO_ROUNDS) == layers


def test_layers_with_adapters_train() -> None:
    from megatron_llamapro.expansion.trainable import first_trainable_layer, trainable_layers

    for blocks, trainable, layers in (
        ("originals", ("lora",), {0, 3}),
        ("added_blocks", ("lora",), {1, 2, 4}),
        ("all", ("lora", "embedding"), {0, 1, 2, 3, 4}),
        ("originals", ("lora", "round_1"), {0, 2, 3}),
        ("originals", ("added_blocks",), {1, 2, 4}),
    ):
        lora = LoraConfig(rank=2, blocks=blocks)
        assert trainable_layers(trainable, TWO_ROUNDS, lora=lora) == layers
        first = -1 if "embedding" in trainable else min(layers)
        assert first_trainable_layer(trainable, TWO_ROUNDS, lora=lora) == first


def test_impossible_adapters_are_refused() -> None:
    from megatron_llamapro.expansion.trainable import check_lora

    dense, experts = tiny_shape(), tiny_shape(num_moe_experts=4, moe_router_topk=2)
    unexpanded = ExpansionPlan.unexpanded(2)
    with pytest.raises(ConfigError, match="has no added blocks: expand it first"):
        check_lora(LoraConfig(rank=2, blocks="added_blocks"), unexpanded, dense)
    with pytest.raises(ConfigError, match="'linear_fc1', which lies in this model's experts"):
        check_lora(LoraConfig(rank=2), unexpanded, experts)
    check_lora(LoraConfig(rank=2, targets=("linear_qkv", "linear_proj")), unexpanded, experts)
    check_lora(LoraConfig(rank=2), unexpanded, dense)


def test_parts_of_every_family_can_be_named() -> None:
    """Biases belong to their projection. Query and key norms, routers and experts have names of their own."""
    attention = {"add_qkv_bias": True, "qk_layernorm": True}
    plan = ExpansionPlan.unexpanded(1).expand((1,))
    block = "decoder.layers.1."
    assert trained(LAYOUTS["one"], "linear_qkv", "k_layernorm", plan=plan, **attention) == {
        f"{block}self_attention.{name}" for name in ("linear_qkv.weight", "linear_qkv.bias", "k_layernorm.weight")
    }
    biases = {"add_qkv_bias": True, "add_bias_linear": True}
    projections = {"linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
    for part, module in projections.items():
        both = {f"{block}{module}.{part}.{kind}" for kind in ("weight", "bias")}
        assert trained(LAYOUTS["one"], part, plan=plan, **biases) == both
    mixture = {"num_moe_experts": 2, "moe_router_topk": 2}
    fc2 = {f"{block}mlp.experts.local_experts.{expert}.linear_fc2.weight" for expert in range(2)}
    fc1 = {name.replace("fc2", "fc1") for name in fc2}
    assert trained(LAYOUTS["one"], "linear_fc2", plan=plan, **mixture) == fc2
    router = f"{block}mlp.router.weight"
    assert trained(LAYOUTS["one"], "experts", "router", plan=plan, **mixture) == fc1 | fc2 | {router}


def test_transformer_engines_names_match_too() -> None:
    """Its norms belong to the next linear, and its experts are one module with numbered weights."""
    from megatron_llamapro.expansion.trainable import BLOCK_PARTS

    def parts_of(name: str) -> set[str]:
        return {
            part for part, found in BLOCK_PARTS.items() if any(p in f"decoder.layers.1.{name}" for p in found.patterns)
        }

    assert parts_of("self_attention.linear_qkv.layer_norm_weight") == {"input_layernorm"}
    assert parts_of("self_attention.linear_qkv.bias") == {"linear_qkv"}
    assert parts_of("self_attention.q_layernorm.weight") == {"q_layernorm"}
    assert parts_of("mlp.linear_fc1.layer_norm_weight") == {"pre_mlp_layernorm"}
    assert parts_of("pre_mlp_layernorm.weight") == {"pre_mlp_layernorm"}
    assert parts_of("mlp.experts.linear_fc1.weight3") == {"linear_fc1", "experts"}
    assert parts_of("mlp.router.weight") == {"router"}


def test_a_tied_embedding_trains_on_both_stages() -> None:
    """megatron.core names the last stage's copy output_layer.weight."""
    pp2 = ParallelConfig(pipeline_model_parallel_size=2)
    assert trained(pp2, "embedding", tied=True) == {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert trained(pp2, "added_blocks", tied=True) == ADDED


def test_the_report_counts_every_parameter_once() -> None:
    parallel = LAYOUTS["tp2 pp2"]
    ranks = run_distributed(freeze_worker, 4, parallel, ("added_blocks",), False, PLAN, {})
    [(_, whole)] = run_distributed(freeze_worker, 1, LAYOUTS["one"], ("added_blocks",), False, PLAN, {})
    stages = [ranks[0][1], ranks[2][1]]
    assert sum(stage.num_stage_trainable for stage in stages) == whole.num_trainable
    assert [stage.trainable_layers for stage in stages] == [(1,), (11,)]
    assert whole.gradient_bytes == 4 * whole.num_trainable and whole.optimizer_bytes == 8 * whole.num_trainable


def test_unknown_or_missing_parts_are_refused() -> None:
    from megatron_llamapro.expansion.trainable import check_trainable

    unexpanded = ExpansionPlan.unexpanded(2)
    for trainable, plan, tied, message in (
        (("added_block",), PLAN, False, "did you mean 'added_blocks'"),
        (("added_blocks",), unexpanded, False, "has no added blocks"),
        (("linear_fc1",), unexpanded, False, "has no added blocks"),
        (("output_layer",), PLAN, True, "name 'embedding'"),
        (("xyz",), PLAN, False, "it is one of added_blocks"),
        (("round_1",), unexpanded, False, "has no added blocks"),
        (("newest_blocks",), unexpanded, False, "has no added blocks"),
        (("round_2",), PLAN, False, "was expanded in 1 round: it has round_1"),
        (("round_3",), TWO_ROUNDS, False, "was expanded in 2 rounds: it has round_1, round_2"),
        (("round_0",), PLAN, False, "did you mean 'round_1'"),
        (("router",), PLAN, False, "'router', which the blocks of this model do not have"),
        (("q_layernorm",), PLAN, False, "'q_layernorm', which the blocks of this model do not have"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_trainable(trainable, plan, tie_word_embeddings=tied, shape=tiny_shape(num_layers=plan.num_layers))
