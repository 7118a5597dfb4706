"""Rules become megatron.core's overrides. A rule that matches nothing, or only frozen parameters, is an error."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import ParamGroupRule
from megatron_llamapro.optimizer.param_groups import param_group_overrides
from megatron_llamapro.testing.distributed import run_distributed


class FakeStage(torch.nn.Module):
    """Names as on a pipeline stage: its only layer is layer 8 of the model, and named 0."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.Module()
        layer.layer_number = 8
        layer.linear, layer.norm = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([layer])


def settings_of(*rules: ParamGroupRule) -> dict[str, dict[str, float]]:
    """Return the merged overrides of each parameter, by stage-local name."""
    stage = FakeStage()
    overrides = param_group_overrides([stage], rules, lr=1.0, min_lr=0.5)
    found = {}
    for name, parameter in stage.named_parameters():
        matching = [values for key, values in overrides.items() if key.matches(parameter, name)]
        found[name.removeprefix("decoder.layers.0.")] = {k: v for values in matching for k, v in values.items()}
    return found


def test_vectors_do_not_decay() -> None:
    found = settings_of()
    assert found["linear.weight"] == {}
    assert found["linear.bias"] == found["norm.weight"] == {"wd_mult": 0.0}


def decay_worker(fields: dict[str, object]) -> set[str]:
    """Return the names, without indices, of the parameters without weight decay in a fully trainable model."""
    import re

    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.model.names import named_parameters
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.testing.tiny_models import tiny_shape

    start_model_parallel(ParallelConfig(), seed=1)
    chunks = build_model(
        tiny_shape(**fields), model=ModelConfig(checkpoint=""), parallel=ParallelConfig(), precision="fp32"
    )
    overrides = param_group_overrides(chunks, lr=1.0)
    return {
        re.sub(r"\.\d+\.", ".", named.name).removeprefix("decoder.layers.")
        for named in named_parameters(chunks)
        for key in overrides
        if key.matches(named.parameter, named.name)
    }


def test_norms_and_biases_of_every_family_do_not_decay() -> None:
    norms = {"input_layernorm.weight", "pre_mlp_layernorm.weight", "decoder.final_layernorm.weight"}
    [dense] = run_distributed(decay_worker, 1, {"add_qkv_bias": True, "qk_layernorm": True})
    assert dense - norms == {
        f"self_attention.{name}" for name in ("linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight")
    }
    assert norms < dense
    assert run_distributed(decay_worker, 1, {"num_moe_experts": 2, "moe_router_topk": 2}) == [norms]


def test_rules_name_global_layers_and_the_first_wins() -> None:
    found = settings_of(
        ParamGroupRule("decoder.layers.7.linear.*", lr_mult=0.1, wd_mult=2.0), ParamGroupRule("*", lr_mult=3.0)
    )
    assert found["linear.weight"] == {"max_lr": 0.1, "min_lr": 0.05, "lr_mult": 0.1, "wd_mult": 2.0}
    assert found["linear.bias"]["wd_mult"] == 2.0
    assert found["norm.weight"] == {"max_lr": 3.0, "min_lr": 1.5, "lr_mult": 3.0, "wd_mult": 0.0}


@pytest.mark.parametrize("pattern", ["decoder.layers.0.*", "*.linaer.*"])
def test_a_rule_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="matches no trainable parameter"):
        settings_of(ParamGroupRule(pattern))


def test_frozen_parameters_do_not_count_as_matches() -> None:
    stage = types.SimpleNamespace(rule=ParamGroupRule("*.norm.*"), module=FakeStage())
    stage.module.decoder.layers[0].norm.requires_grad_(False)
    with pytest.raises(ConfigError, match="matches no trainable parameter"):
        param_group_overrides([stage.module], [stage.rule], lr=1.0)
