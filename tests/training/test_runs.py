"""Whole runs on a tiny model: which weights move, which do not, and resuming as if never interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import workers
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
VIRTUAL = ParallelConfig(
    pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_stage_layers=(2, 1, 2, 1)
)


def moved(before: Path, after: Path) -> set[str]:
    """Return the names of the tensors that differ in any bit between two Megatron checkpoints."""
    one, other = read_tensors(before), read_tensors(after)
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_added_blocks_move(dtype: str, run_config: Callable) -> None:
    """TP 2 x PP 2: every tensor of an added block moves, and no other. Only they have optimizer state."""
    config = run_config(dtype=dtype, parallel=TP2_PP2)
    results = run_distributed(workers.train, 4, config)
    changed = moved(Path(config.model.checkpoint), Path(config.checkpoint.save))
    assert {name.split(".")[2] for name in changed} == {"2", "5"}
    assert len(changed) == 2 * 9
    for result in results:
        assert result.optimizer_bytes == 2 * 4 * result.num_trainable  # two float32 moments
        assert result.figures == results[0].figures


def test_everything_trains_on_request(run_config: Callable) -> None:
    config = run_config(trainable=("everything",), train_iters=2)
    run_distributed(workers.train, 1, config)
    changed = moved(Path(config.model.checkpoint), Path(config.checkpoint.save))
    assert len(changed) == 6 * 9 + 3


def test_only_named_parts_train(run_config: Callable) -> None:
    config = run_config(trainable=("linear_proj", "final_norm"), train_iters=2)
    run_distributed(workers.train, 1, config)
    assert moved(Path(config.model.checkpoint), Path(config.checkpoint.save)) == {
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.5.self_attn.o_proj.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("parallel", "world_size"), [(ParallelConfig(), 2), (PP2, 2)], ids=["dp2", "pp2"])
def test_resume_is_bit_exact(dtype: str, parallel: ParallelConfig, world_size: int, run_config: Callable) -> None:
    whole = run_distributed(workers.train, world_size, run_config(dtype=dtype, parallel=parallel, save="whole"))
    cut = run_config(dtype=dtype, parallel=parallel, save="cut", exit_interval=2)
    first = run_distributed(workers.train, world_size, cut)
    second = run_distributed(workers.train, world_size, cut)
    assert [step for step, *_ in second[0].figures] == [3, 4]
    assert first[0].figures + second[0].figures == whole[0].figures


@pytest.mark.parametrize(
    ("saved_with", "saved_ranks", "loaded_with", "loaded_ranks"),
    [
        (ParallelConfig(), 2, TP2_PP2, 4),
        (TP2_PP2, 4, ParallelConfig(), 1),
        (PP2, 2, VIRTUAL, 2),
        (VIRTUAL, 2, ParallelConfig(), 2),
    ],
    ids=["dp2 to tp2 pp2", "tp2 pp2 to one", "pp2 to virtual pp2", "virtual pp2 to dp2"],
)
def test_resume_at_another_layout_gives_the_same_losses(
    saved_with, saved_ranks, loaded_with, loaded_ranks, run_config: Callable
) -> None:
    """Equal to 1e-5, because the sums have another order."""
    whole = run_distributed(workers.train, 1, run_config(save="whole"))[0].figures
    run_distributed(workers.train, saved_ranks, run_config(parallel=saved_with, save="cut", exit_interval=2))
    rest = run_distributed(workers.train, loaded_ranks, run_config(parallel=loaded_with, save="cut"))[0].figures
    assert [step for step, *_ in rest] == [3, 4]
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_experts_train_and_resume_at_another_layout(run_config: Callable, models: Callable) -> None:
    """Mixtral's added blocks with router and every expert move, and nothing else."""
    folder = models(**TINY_FAMILIES["mixtral"]).expanded_megatron
    whole = run_distributed(workers.train, 1, run_config(checkpoint=folder, save="whole"))[0].figures
    first = run_config(checkpoint=folder, save="cut", parallel=TP2_PP2, exit_interval=2)
    rest = run_config(checkpoint=folder, save="cut")
    figures = [run_distributed(workers.train, ranks, config)[0].figures for ranks, config in ((4, first), (1, rest))]
    for ours, theirs in zip(figures[0] + figures[1], whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    changed = moved(folder, Path(rest.checkpoint.save))
    assert {name.split(".")[2] for name in changed} == {"2", "5"}
    assert len(changed) == 2 * (6 + 1 + 4 * 3)


def test_a_stage_with_nothing_to_train_resumes(run_config: Callable, models: Callable, tmp_path: Path) -> None:
    """Blocks are added at the end only: the first stage has no optimizer state to save or load."""
    from megatron_llamapro.checkpoint.convert import hf_to_megatron

    folder = tmp_path / "suffix"
    hf_to_megatron(models().original_hf, folder, expansion=Expansion.at(4, 5))
    whole = run_distributed(workers.train, 2, run_config(checkpoint=folder, parallel=PP2, save="whole"))
    cut = run_config(checkpoint=folder, parallel=PP2, save="cut", exit_interval=2)
    parts = [run_distributed(workers.train, 2, cut)[0].figures for _ in range(2)]
    assert parts[0] + parts[1] == whole[0].figures
    assert whole[0].num_trainable == 0 and whole[0].optimizer_bytes == 0


def test_held_out_losses_do_not_depend_on_the_layout(run_config: Callable) -> None:
    """Nine samples over two replicas of one: the last place is filled but does not count."""
    one = run_distributed(workers.train, 1, run_config(save="one", eval_interval=2, eval_samples=9))[0].held_out
    two = run_distributed(workers.train, 2, run_config(save="two", eval_interval=2, eval_samples=9))[0].held_out
    assert [(step, name) for step, name, _ in one] == [(0, "b"), (2, "b"), (4, "b")]
    for ours, theirs in zip(one, two, strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-5)


def test_sigterm_saves_and_ends_the_run(run_config: Callable) -> None:
    """The step in progress is finished, all ranks save, and a second start resumes from the save."""
    config = run_config(parallel=PP2, train_iters=6)
    stopped = run_distributed(workers.train, 2, config, 2)
    last = stopped[0].figures[-1][0]
    assert last == 3  # the signal came after step 2 was reported
    rest = run_distributed(workers.train, 2, config)
    assert [step for step, *_ in rest[0].figures] == [4, 5, 6]


def test_a_finished_run_does_nothing_more(run_config: Callable) -> None:
    config = run_config(train_iters=1)
    run_distributed(workers.train, 1, config)
    assert run_distributed(workers.train, 1, config)[0].figures == []
    assert run_distributed(workers.printed, 1, config) == [
        f"nothing is left to do: step 1 of 1 is saved in {config.checkpoint.save}\n"
    ]


def test_a_learning_rate_of_zero_keeps_a_projection(run_config: Callable, tmp_path: Path) -> None:
    """A parameter-group rule sets it; it still holds after a resume."""
    from megatron_llamapro.config.schema import ParamGroupRule

    config = run_config(train_iters=4, exit_interval=2)
    rules = (ParamGroupRule(match="*.linear_fc2.weight", lr_mult=0.0),)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, param_groups=rules))
    for _ in range(2):
        run_distributed(workers.train, 2, config)
    changed = moved(Path(config.model.checkpoint), Path(config.checkpoint.save))
    assert "model.layers.5.self_attn.o_proj.weight" in changed
    assert not any("down_proj" in name for name in changed)
