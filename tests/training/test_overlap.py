"""With `overlap_param_gather` a replica's weights are one step old until the next forward pass. Saved weights, and
figures about them, are bit-equal to those of the same run without overlap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import workers
from gradients import parallel
from megatron_llamapro.config.schema import ParallelConfig, RunConfig
from megatron_llamapro.testing.checkpoints import read_tensors, read_with_torch
from megatron_llamapro.testing.distributed import run_distributed

LAYOUTS = {
    "dp2": (2, parallel()),
    "dp4": (4, parallel()),
    "tp2 dp2": (4, parallel(tp=2, sp=True)),
    "pp2 dp2": (4, parallel(pp=2)),
    "pp2 virtual 2 dp2": (4, parallel(pp=2, vp=2)),
}
STEPS = 3
# (delta, asynchronous): each with each, and with each type of the weights.
WAYS = {"float32": ((False, False), (True, True)), "bfloat16": ((False, True), (True, False))}


def overlapped(config: ParallelConfig) -> ParallelConfig:
    return replace(config, overlap_grad_reduce=True, overlap_param_gather=True)


def saving(config: RunConfig, *, delta: bool = False, async_save: bool = False) -> RunConfig:
    """Save after every step; only the last save follows an evaluation."""
    return replace(config, checkpoint=replace(config.checkpoint, save_interval=1, delta=delta, async_save=async_save))


def train_all(configs: list[RunConfig]) -> list[workers.Result]:
    """Train one run after another in one world."""
    return [workers.train(config) for config in configs]


def checkpoints(config: RunConfig) -> list[Path]:
    found = sorted(Path(config.checkpoint.save).glob("iter_*"))
    assert len(found) == STEPS
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], where: Path) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"{where}: {differing}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_weights_are_those_of_the_last_update(layout: str, dtype: str, run_config: Callable) -> None:
    """Full and delta, synchronous and asynchronous, with and without an evaluation just before."""
    num_ranks, config = LAYOUTS[layout]
    make = partial(run_config, dtype=dtype, train_iters=STEPS, eval_interval=STEPS, eval_samples=8)
    plain = saving(make(parallel=config, save="plain"))
    others = {
        (delta, beside): saving(
            make(parallel=overlapped(config), save=f"delta {delta} async {beside}"), delta=delta, async_save=beside
        )
        for delta, beside in WAYS[dtype]
    }
    results = run_distributed(train_all, num_ranks, [plain, *others.values()])[0]
    assert all(result.figures == results[0].figures and len(result.figures) == STEPS for result in results)
    expected = [read_tensors(folder) for folder in checkpoints(plain)]
    assert not torch.equal(*(step["model.layers.5.mlp.down_proj.weight"] for step in expected[-2:]))
    for (delta, _), other in others.items():
        for folder, tensors in zip(checkpoints(other), expected, strict=True):
            assert_same(read_tensors(folder), tensors, folder)
        if not delta:  # the rest of a full save too: float32 weights, moments
            assert_same(*(read_with_torch(checkpoints(run)[-1]) for run in (other, plain)), checkpoints(other)[-1])


def test_a_run_resumes_with_or_without_overlap(run_config: Callable) -> None:
    """In both directions, with the losses of an uninterrupted run."""
    configs = {"plain": parallel(), "overlapped": overlapped(parallel())}
    make = partial(run_config, train_iters=STEPS)
    whole = run_distributed(workers.train, 2, make(save="whole"))[0].figures
    for first, second in (("plain", "overlapped"), ("overlapped", "plain")):
        runs = [make(save=f"from {first}", parallel=configs[name]) for name in (first, second)]
        cut = replace(runs[0], training=replace(runs[0].training, exit_interval=2))
        [parts] = [run_distributed(train_all, 2, [cut, runs[1]])[0]]
        assert [*parts[0].figures, *parts[1].figures] == whole


@pytest.mark.parametrize("layout", ["dp2", "pp2 virtual 2 dp2"])
def test_diagnostics_read_the_updated_weights(layout: str, run_config: Callable) -> None:
    num_ranks, config = LAYOUTS[layout]
    make = partial(run_config, train_iters=STEPS)
    runs = [make(save=str(number), parallel=one) for number, one in enumerate((config, overlapped(config)))]
    runs = [replace(run, logging=replace(run.logging, diagnostics_interval=1)) for run in runs]
    plain, other = run_distributed(train_all, num_ranks, runs)[0]
    assert plain.blocks == other.blocks and len(plain.blocks) == 2 * STEPS


@pytest.mark.parametrize("layout", ["dp2", "pp2 virtual 2 dp2"])
def test_several_buckets_save_the_same_weights(layout: str, run_config: Callable) -> None:
    """Every real run with overlap has many padded buckets; megatron.core 0.16.1 then saves the optimizer state shifted.
    With virtual stages only the schedule starts their gathers, otherwise hooks warn about a second start.

    Gradients are not clipped: their norm is a sum in another order.
    """
    num_ranks, config = LAYOUTS[layout]
    make = partial(run_config, trainable=("everything",), train_iters=STEPS)
    runs = [make(save=str(number), parallel=one) for number, one in enumerate((config, overlapped(config)))]
    runs = [saving(replace(run, optimizer=replace(run.optimizer, clip_grad=0.0))) for run in runs]
    [(num_padded, (plain, other)), *_] = run_distributed(train_in_small_buckets, num_ranks, runs)
    assert num_padded > 1
    assert losses(plain) == losses(other)
    for one, two in zip(*map(checkpoints, runs), strict=True):
        assert_same(read_with_torch(one), read_with_torch(two), two)
    resumed = replace(runs[1], checkpoint=replace(runs[1].checkpoint, save_interval=0))
    (Path(resumed.checkpoint.save) / "latest_checkpointed_iteration.txt").write_text("2\n")
    [(_, [rest]), *_] = run_distributed(train_in_small_buckets, num_ranks, [resumed])
    assert losses(rest) == losses(plain)[2:]


def losses(result: workers.Result) -> list[float]:
    return [loss for _, loss, _, _ in result.figures]


def train_in_small_buckets(configs: list[RunConfig]) -> tuple[int, list[workers.Result]]:
    """Train, and also return how many of this rank's buckets have padding after them."""
    from megatron_llamapro.training import machine

    buffers: list = []
    wrap = machine.wrapped

    def small_buckets(model: torch.nn.Module, config: ParallelConfig):
        ddp = wrap(model, config)
        buffers.extend(ddp.buffers)
        return ddp

    machine.DistributedDataParallelConfig = partial(machine.DistributedDataParallelConfig, bucket_size=5000)
    machine.wrapped = small_buckets
    warnings.filterwarnings("error", message="The next bucket's parameter all-gather")
    results = train_all(configs)
    padded = [b for buffer in buffers for b in buffer.buckets[:-1] if b.numel_unpadded < b.grad_data.numel()]
    return len(padded), results
