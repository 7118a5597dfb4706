"""The report that a run prints when it starts: stages, trainable blocks, bytes; and figures from the model's shape."""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist

from megatron_llamapro.checkpoint.description import trains_of
from megatron_llamapro.config.pipeline_stages import draw, stage_layers
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import GIB, binary_size
from megatron_llamapro.data.dataset import conversation_sets
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.model.freeze import StageReport
from megatron_llamapro.planning.flops import Work, step_work
from megatron_llamapro.training.setup import Run


def print_report(run: Run) -> dict[str, object]:
    """Print the trainable blocks of every stage, on rank 0. All ranks call it. Return the `run` record."""
    stages = _first_of_each_stage(run)
    parameters = sum(stage.num_stage_parameters for stage in stages)
    trainable = sum(stage.num_stage_trainable for stage in stages)
    record = _run_record(run, parameters=parameters, trainable=trainable)
    if run.layout.rank == 0:
        plan = run.start.plan
        counts = stage_layers(run.config.parallel, run.start.shape.num_layers)
        print(draw(counts, set(plan.added_layers), num_stages=run.layout.pipeline_size))
        print("E embedding, o original block, A added block, H head; per rank of each stage:")
        for number, stage in enumerate(stages):
            print(_stage_line(number, stage, run.layout.data_size))
        share = trainable / parameters
        layout = run.layout
        ranks = f"{layout.world_size} rank{'s' * (layout.world_size > 1)}"
        print(
            f"{trainable:,} of {parameters:,} parameters train ({share:.1%}); {ranks}: TP {layout.tensor_size} "
            f"x PP {layout.pipeline_size} x DP {layout.data_size}",
            flush=True,
        )
        for conversations in conversation_sets(run.train_set):
            print(conversations.summary)
        if run.state.iteration:
            print(f"resuming from {run.config.checkpoint.save}, step {run.state.iteration}", flush=True)
    return record


def _first_of_each_stage(run: Run) -> list[StageReport]:
    everyone: list = [None] * run.layout.world_size
    dist.all_gather_object(everyone, (run.layout.pipeline_rank, run.machine.report))
    first = {}
    for stage, report in everyone:
        first.setdefault(stage, report)
    return [first[stage] for stage in sorted(first)]


def _stage_line(number: int, stage: StageReport, data_size: int) -> str:
    blocks = ", ".join(map(str, stage.trainable_layers)) or "none"
    return (
        f"  stage {number}: {stage.num_layers} blocks, trainable in {blocks}; "
        f"{stage.num_trainable:,} of {stage.num_parameters:,} parameters; weights {binary_size(stage.weight_bytes)}, "
        f"gradients {binary_size(stage.gradient_bytes)}, optimizer {binary_size(stage.optimizer_bytes / data_size)}"
    )


def _run_record(run: Run, *, parameters: int, trainable: int) -> dict[str, object]:
    return {
        "kind": "run",
        "iteration": run.state.iteration,
        "world_size": run.layout.world_size,
        "tensor_model_parallel_size": run.layout.tensor_size,
        "pipeline_model_parallel_size": run.layout.pipeline_size,
        "data_parallel_size": run.layout.data_size,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "trainable": list(run.config.model.trainable),
    }


def work_per_token(config: RunConfig, shape: ModelShape, plan: ExpansionPlan) -> Work:
    """Return the FLOPs to train one token, by arithmetic (planning/flops.py), without those that freezing saves."""
    return step_work(shape, seq_length=config.data.seq_length, trains=trains_of(config, shape, plan))


def peak_memory_gib() -> float:
    """Return the most memory that this rank has held: on the GPU, or in the process if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
