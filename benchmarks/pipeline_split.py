"""Measures the planner's split and the even one on two real stages, each on its own core, and compares the predictions.

python benchmarks/pipeline_split.py [--rounds 3] [--json FILE]
python benchmarks/pipeline_split.py --tiny

First the blocks are timed, on both cores at once, and the planner plans with these times. Then both splits train, in
turns. Needs two cores that nothing else uses.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from conversion_table import describe_machine
from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.schema import (
    BlendEntry,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.trainable_part import TrainablePart
from megatron_llamapro.families.hf_config import model_shape
from megatron_llamapro.planning.job import Job, time_from_calibration
from megatron_llamapro.planning.memory import Division
from megatron_llamapro.planning.splits import best_plan, even_plan
from megatron_llamapro.testing.distributed import run_distributed
from random_llama import LlamaShape, hf_config

_WARM_UP = 2


@dataclass(frozen=True)
class Setting:
    """A model with `added` trainable blocks after all others, so that the first stage has no backward pass."""

    shape: LlamaShape
    added: int
    seq_length: int
    num_microbatches: int
    steps: int

    @property
    def model(self) -> DescribedModel:
        layers = self.shape.num_hidden_layers
        plan = ExpansionPlan.unexpanded(layers).expand(range(layers, layers + self.added))
        return DescribedModel.expanded(model_shape(hf_config(self.shape)), plan)

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            model=ModelConfig(checkpoint="none"),
            data=DataConfig(train=(BlendEntry("none"),), seq_length=self.seq_length),
            training=TrainingConfig(
                train_iters=100, micro_batch_size=1, global_batch_size=self.num_microbatches, precision="fp32"
            ),
        )


SETTINGS = {
    "full": Setting(LlamaShape(512, 1376, 14, 8, 4, 8192, 512), added=4, seq_length=256, num_microbatches=16, steps=5),
    "tiny": Setting(LlamaShape(64, 96, 6, 4, 2, 128, 64), added=2, seq_length=32, num_microbatches=4, steps=2),
}


def main() -> int:
    """Time the blocks, plan, train both splits, and compare."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="quick check; its numbers mean nothing")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every step's seconds")
    args = parser.parse_args()
    setting = SETTINGS["tiny" if args.tiny else "full"]
    rounds = 1 if args.tiny else args.rounds
    job = planned_job(setting, run_distributed(time_blocks, 2, setting))
    even, best = even_plan(job), best_plan(job)
    splits = {"even": even, "planned": best}
    seconds: dict[str, list[float]] = {name: [] for name in splits}
    for number in range(rounds):
        for name, plan in splits.items():
            print(f"round {number + 1} of {rounds}: {name} split {plan.counts}", file=sys.stderr, flush=True)
            seconds[name] += run_distributed(train, 2, setting, plan.counts)[0]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("| split | layers | predicted, s | measured, s (fastest – slowest) |\n|---|---|---|---|")
    for name, plan in splits.items():
        spread = f"{min(seconds[name]):.3f} – {max(seconds[name]):.3f}"
        print(f"| {name} | {plan.counts} | {plan.seconds:.3f} | {medians[name]:.3f} ({spread}) |")
    predicted, measured = even.seconds / best.seconds, medians["even"] / medians["planned"]
    print(f"\nthe planned split is {measured:.3f} x as fast as the even one; predicted {predicted:.3f} x")
    machine = describe_machine(Path.cwd(), venv=None)
    print("\n".join(f"- {name}: {machine[name]}" for name in ("machine", "versions", "date")))
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "predicted": predicted, "measured": measured}, indent=2))
    return 0


def planned_job(setting: Setting, measured: list[dict]) -> Job:
    """Return a job with the slower core's times, because a pipeline waits for it."""
    kinds = measured[0]
    times = {
        kind: {way: max(rank[kind][way] for rank in measured) for way in ("forward", "backward")} for kind in kinds
    }
    shape, plan = setting.model.shape, setting.model.plan
    trains = TrainablePart(frozenset(plan.added_layers))
    return Job(
        shape=shape,
        trains=trains,
        division=Division(seq_length=setting.seq_length, itemsize=4),
        time=time_from_calibration(shape, trains, times),
        num_stages=2,
        num_chunks=1,
        num_microbatches=setting.num_microbatches,
    )


def _stay_on_one_core() -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})


def time_blocks(setting: Setting) -> dict:
    """Return the blocks' times. Every rank is a replica, alone on its core."""
    from megatron_llamapro.training.calibration import calibrate

    _stay_on_one_core()
    return calibrate(setting.config, setting.model.shape)


def train(setting: Setting, counts: tuple[int, ...]) -> list[float]:
    """Return the seconds of every step after the warm-up."""
    import torch

    from megatron_llamapro.training.machine import build_machine
    from megatron_llamapro.training.step import train_step

    _stay_on_one_core()
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_stage_layers=counts)
    config = replace(setting.config, parallel=parallel)
    machine = build_machine(config, setting.model.shape, setting.model.plan, load=_random_weights)
    tokens = torch.randint(setting.shape.vocab_size, (1, setting.seq_length))
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(1, setting.seq_length),
        "position_ids": torch.arange(setting.seq_length)[None],
    }
    seconds = []
    for _ in range(_WARM_UP + setting.steps):
        torch.distributed.barrier()
        started = time.perf_counter()
        train_step(
            machine,
            [iter([batch] * setting.num_microbatches)],
            num_microbatches=setting.num_microbatches,
            micro_batch_size=1,
            seq_length=setting.seq_length,
        )
        seconds.append(time.perf_counter() - started)
    return seconds[_WARM_UP:]


def _random_weights(models: list) -> None:
    import torch

    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.normal_(std=0.02)


if __name__ == "__main__":
    run_command(main)
