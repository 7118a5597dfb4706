"""Speed and cost of a whole run, from its step time."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llamapro.planning.flops import step_work
from megatron_llamapro.planning.job import Job


@dataclass(frozen=True)
class RunCost:
    """Speed and cost of a run."""

    tokens_per_second: float
    """Over all ranks."""
    model_flops_utilization: float
    """FLOPs that the training needs, as a fraction of the ranks' peak."""
    gpu_hours: float
    """For the requested tokens."""


PEAK_TFLOPS, EFFICIENCY, TOKENS = 989, 0.4, 80e9
"""An H100's dense bfloat16 from its data sheet; a round number (docs/planning.md); the paper's tokens."""


def run_cost(job: Job, seconds: float, *, peak_tflops: float = PEAK_TFLOPS, tokens: float = TOKENS) -> RunCost:
    """Return speed and cost of a job whose step takes `seconds`."""
    division = job.division
    num_ranks = division.tensor_size * job.num_stages * division.data_size
    speed = job.num_microbatches * division.tokens * division.data_size / seconds
    work = step_work(job.shape, seq_length=division.seq_length, trains=job.trains).total
    return RunCost(speed, work * speed / (num_ranks * peak_tflops * 1e12), tokens / speed / 3600 * num_ranks)
