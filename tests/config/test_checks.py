"""Values that contradict each other are refused, and the message says what to do."""

import dataclasses
from pathlib import Path

import pytest

from megatron_llamapro.config.checks import (
    check_model,
    check_run_config,
    check_samples,
    data_parallel_size,
    is_left_out,
)
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import (
    BlendEntry,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParamGroupRule,
    RunConfig,
    TrainingConfig,
)

BASE = RunConfig(
    model=ModelConfig(checkpoint="c"),
    data=DataConfig(train=(BlendEntry("a"),), seq_length=8, valid={"v": "b"}),
    training=TrainingConfig(train_iters=10, micro_batch_size=2, global_batch_size=8),
)


def changed(**fields: object) -> RunConfig:
    """Return BASE with `section__field=value` replaced."""
    config = BASE
    for name, value in fields.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


def test_the_base_is_valid() -> None:
    check_run_config(BASE)
    assert data_parallel_size(BASE, 4) == 4


BAD_ENTRIES = (0, -1, 11, "3-11", "5-4", "a", "3-", "3..4", "1e2", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training__micro_batch_size": 0}, "at least 1"),
        ({"optimizer__lr": -1.0}, "cannot be negative"),
        ({"optimizer__lr_warmup_fraction": 6.0}, r"must be in \[0, 1\)"),
        ({"optimizer__min_lr": 1.0}, "above optimizer.lr"),
        ({"data__train": ()}, "data.train is empty"),
        (
            {"data__train_samples": 79},
            r"is 79, but 10 steps of 8 samples need 80: set --data\.train_samples 80, or .* 9",
        ),
        ({"data__valid": {}, "training__eval_interval": 5}, "names no held-out set"),
        ({"parallel__virtual_pipeline_model_parallel_size": 2}, "at least 2 of each"),
        ({"parallel__pipeline_stage_layers": (3, 3)}, "needs one number"),
        ({"parallel__sequence_parallel": True}, "tensor_model_parallel_size above 1"),
        ({"parallel__overlap_param_gather": True}, "overlap_grad_reduce"),
        ({"recompute__granularity": "full", "recompute__num_layers": 1}, r"needs recompute\.method"),
        ({"recompute__granularity": "selective"}, r"name recompute\.modules"),
        ({"recompute__num_layers": 2}, r"recompute\.num_layers is set, but recompute\.granularity is None"),
        ({"recompute__modules": ("mlp",)}, "applies only to selective"),
        ({"training__exit_interval": 0}, "at least 1"),
        ({"logging__wandb_name": "first"}, r"logging\.wandb_project is not: set both"),
        ({"training__exit_interval": 5}, r"saves and stops: set checkpoint\.save"),
        ({"checkpoint__save_interval": 5}, r"nothing is saved: set checkpoint\.save"),
        ({"checkpoint__keep_last": 5}, r"nothing is saved: set checkpoint\.save"),
        ({"training__max_skipped_steps": 0}, "at least 1"),
        *(({"training__skip_iterations": (entry,)}, f"has {entry}: give a step") for entry in BAD_ENTRIES),
        ({"data__num_workers": -1}, r"data\.num_workers is -1: it cannot be negative"),
        ({"data__num_workers": 1001}, r"data\.num_workers is 1001: it must be at most 1000"),
        ({"data__train_samples": 0}, r"data\.train_samples is 0: it must be at least 1"),
        ({"training__seed": -1}, r"training\.seed is -1: it cannot be negative"),
        ({"training__hang_timeout_minutes": 1e7}, "must be at most"),
        ({"parallel__distributed_timeout_minutes": 0.0}, "must be above 0"),
        ({"optimizer__param_groups": (ParamGroupRule("*", lr_mult=-1.0),)}, r"wd_mult of .* cannot be negative"),
        ({"model__trainable": ()}, "trainable is empty"),
        ({"model__trainable": ("lora",)}, r"set lora\.rank, e\.g\. 16"),
        ({"lora__rank": 4}, r"add lora to model\.trainable"),
        ({"lora__blocks": "all"}, r"add lora to model\.trainable"),
        ({"lora__rank": 0, "model__trainable": ("lora",)}, r"lora\.rank is 0: it must be at least 1"),
        ({"lora__rank": 4, "lora__alpha": 0.0, "model__trainable": ("lora",)}, r"lora\.alpha is 0\.0"),
        ({"lora__rank": 4, "lora__targets": (), "model__trainable": ("lora",)}, r"lora\.targets is empty"),
        ({"keep__penalty_weight": -1.0}, r"keep\.penalty_weight is -1\.0: it must be a number from 0 on"),
        ({"keep__penalty_weight": float("inf")}, r"keep\.penalty_weight is inf"),
        ({"keep__penalty_weight": float("nan")}, r"keep\.penalty_weight is nan"),
        (
            {"keep__penalty_weight": 1.0, "keep__penalty_on": "known"},
            r"no source of data\.train is: mark one with known: true",
        ),
        ({"lora__rank": 4, "model__trainable": ("lora", "everything")}, "everything and lora: choose one of them"),
    ],
)
def test_bad_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run_config(changed(**fields))


@pytest.mark.parametrize(
    ("fields", "world_size", "message"),
    [
        ({"parallel__tensor_model_parallel_size": 2}, 3, "multiple of 2 processes"),
        ({}, 3, "not a multiple of micro_batch_size"),
        (
            {
                "parallel__pipeline_model_parallel_size": 4,
                "parallel__virtual_pipeline_model_parallel_size": 2,
                "training__global_batch_size": 12,
            },
            4,
            "multiple of 4 micro-batches",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_world_is_refused(fields: dict, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_parallel_size(changed(**fields), world_size)


def test_a_resumed_run_needs_samples_for_its_remaining_steps() -> None:
    """Half of 48 samples were used in steps of 8, the rest in steps of 4."""
    config = changed(data__train_samples=48, training__global_batch_size=4)
    with pytest.raises(ConfigError, match=r"32 \+ 24 > 48; set --training\.train_iters 8, or .*batch_size 2 or less"):
        check_samples(config, iteration=4, consumed_samples=32)
    check_samples(changed(data__train_samples=48, training__train_iters=8), iteration=6, consumed_samples=32)
    check_samples(config, iteration=10, consumed_samples=48)


def test_a_larger_batch_for_the_remaining_steps_is_valid(tmp_path: Path) -> None:
    """Only the checkpoint knows how many samples the first steps used."""
    larger = changed(data__train_samples=79)
    with pytest.raises(ConfigError, match="need 80"):
        check_run_config(changed(data__train_samples=79, checkpoint__save=str(tmp_path / "new")))
    check_run_config(dataclasses.replace(larger, checkpoint=CheckpointConfig(save=str(tmp_path))))
    check_samples(larger, iteration=4, consumed_samples=16)


def test_skipped_steps_are_numbers_and_ranges() -> None:
    training = changed(training__skip_iterations=(2, "7-9", "10")).training
    assert [step for step in range(12) if is_left_out(step, training)] == [2, 7, 8, 9, 10]


MODEL = {"num_layers": 6, "num_attention_heads": 8, "num_query_groups": 2, "ffn_hidden_size": 16}


@pytest.mark.parametrize(("part", "has_experts"), [("moe", False), ("mlp", True)])
def test_recomputing_a_missing_part_is_refused(part: str, has_experts: bool) -> None:
    with pytest.raises(ConfigError, match=f"names '{part}', but the model has"):
        check_model(changed(recompute__modules=(part,)), **MODEL, has_experts=has_experts)


def test_experts_on_several_tensor_ranks_need_sequence_parallelism() -> None:
    tensor_parallel = {"parallel__tensor_model_parallel_size": 2, "data__seq_length": 32}
    with pytest.raises(ConfigError, match=r"set parallel\.sequence_parallel to true"):
        check_model(changed(**tensor_parallel), **MODEL, has_experts=True)
    check_model(changed(**tensor_parallel, parallel__sequence_parallel=True), **MODEL, has_experts=True)
    check_model(changed(), **MODEL, has_experts=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel__tensor_model_parallel_size": 4}, "query groups"),
        ({"parallel__tensor_model_parallel_size": 3}, "attention heads"),
        ({"parallel__pipeline_model_parallel_size": 7}, "fewer than the 7"),
        (
            {"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_stage_layers": (3, 4)},
            "7 layers in total",
        ),
        (
            {
                "parallel__tensor_model_parallel_size": 2,
                "parallel__sequence_parallel": True,
                "data__seq_length": 7,
            },
            "cannot be divided by 2 tensor-parallel ranks",
        ),
    ],
)
def test_fields_that_do_not_fit_the_model_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(changed(**fields), **MODEL)
