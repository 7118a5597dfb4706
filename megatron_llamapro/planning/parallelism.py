"""Finds the best division of a job's ranks into tensor-parallel ranks x stages x replicas, by arithmetic.

Each division is a configuration, and is checked like a run's. `planning/splits.py` splits its layers over stages, and
`planning/network.py` gives the seconds of its messages. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_llamapro.checkpoint.description import DescribedModel, check_fits
from megatron_llamapro.config.checks import check_run_config
from megatron_llamapro.config.errors import ConfigError, PipelinePlanError
from megatron_llamapro.config.schema import ParallelConfig, RecomputeConfig, RunConfig
from megatron_llamapro.config.values import GIB
from megatron_llamapro.planning.job import Job, job_of
from megatron_llamapro.planning.network import Network, replicas_time, tensor_parallel_time
from megatron_llamapro.planning.splits import Plan, balanced_plan, even_plan

RECOMPUTE_ALL = RecomputeConfig(granularity="full", method="uniform", num_layers=1)


@dataclass(frozen=True)
class Cluster:
    """The ranks and the network that a job runs on."""

    num_ranks: int
    flops_per_second: float
    """A rank's real rate."""
    memory_bytes: float
    """Memory per rank."""
    network: Network


@dataclass(frozen=True)
class Parallelism:
    """One division of the ranks, and the time of a step with it."""

    config: RunConfig
    job: Job
    plan: Plan
    seconds: float
    """Per step, with the part of the replicas' messages that is not hidden; without the optimizer's update."""

    @property
    def memory_bytes(self) -> float:
        """Memory of the stage that holds the most."""
        return max(self.plan.stage_bytes)


def best_parallelisms(config: RunConfig, model: DescribedModel, cluster: Cluster, *, at_most: int) -> list[Parallelism]:
    """Return the divisions with the least step time that fit, the best first. `config`'s sections parallel and
    recompute are replaced; its batch sizes are kept.

    Raises:
        ConfigError: the model cannot be trained as configured, or no division of the ranks also divides the batch.
        PipelinePlanError: no division fits into memory.
    """
    check_fits(_undivided(config), model.shape, model.plan)
    if cluster.num_ranks < cluster.network.ranks_per_node:  # treat a part of a node as a node
        network = replace(cluster.network, ranks_per_node=cluster.num_ranks)
        cluster = replace(cluster, network=network)
    jobs = sorted(_jobs(config, model, cluster), key=lambda each: _least_seconds(each[1]))
    if not jobs:
        raise ConfigError(
            f"{cluster.num_ranks} ranks, training.global_batch_size {config.training.global_batch_size} and "
            f"micro_batch_size {config.training.micro_batch_size}: no division of the ranks also divides the batch"
        )
    found: list[Parallelism] = []
    for changed, job in jobs:
        if len(found) == at_most and _least_seconds(job) >= found[-1].seconds:
            break
        planned = _planned(changed, job, cluster)
        if planned is not None:
            found = sorted([*found, planned], key=lambda each: each.seconds)[:at_most]
    if not found:
        least = min(max(even_plan(replace(job, recompute=RECOMPUTE_ALL)).stage_bytes) for _, job in jobs)
        raise PipelinePlanError(
            f"no division of {cluster.num_ranks} ranks fits into {cluster.memory_bytes / GIB:g} GiB per rank: the "
            f"smallest needs {least / GIB:.3g}"
        )
    return found


def _jobs(config: RunConfig, model: DescribedModel, cluster: Cluster) -> Iterator[tuple[RunConfig, Job]]:
    for changed in _divisions(config, model.shape.num_layers, cluster):
        try:
            check_run_config(changed)
            check_fits(changed, model.shape, model.plan)
            yield changed, _job(changed, model, cluster)
        except ConfigError:
            continue  # it does not divide


def _divisions(config: RunConfig, num_layers: int, cluster: Cluster) -> Iterator[RunConfig]:
    """Yield a configuration per division. Tensor-parallel ranks stay within a node; replicas hide their messages."""
    node = cluster.network.ranks_per_node
    for tensor_size in (each for each in _divisors(cluster.num_ranks, node) if node % each == 0):
        for stages in _divisors(cluster.num_ranks // tensor_size, num_layers):
            has_replicas = tensor_size * stages < cluster.num_ranks
            alone = _undivided(config)
            parallel = replace(
                alone.parallel,
                tensor_model_parallel_size=tensor_size,
                sequence_parallel=tensor_size > 1,
                pipeline_model_parallel_size=stages,
                overlap_grad_reduce=has_replicas,
                overlap_param_gather=has_replicas,
            )
            yield replace(alone, parallel=parallel)


def _undivided(config: RunConfig) -> RunConfig:
    kept = ParallelConfig(distributed_timeout_minutes=config.parallel.distributed_timeout_minutes)
    return replace(config, parallel=kept, recompute=RecomputeConfig())


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def _job(config: RunConfig, model: DescribedModel, cluster: Cluster) -> Job:
    job = job_of(
        config,
        model.shape,
        model.plan,
        world_size=cluster.num_ranks,
        flops_per_second=cluster.flops_per_second,
        memory_bytes=cluster.memory_bytes,
    )
    division = job.division
    messages = tensor_parallel_time(job.shape, job.trains, division, cluster.network)
    hidden = division.tokens * job.shape.hidden_size * division.itemsize
    along = division.tensor_size if division.sequence_parallel else 1
    stride = division.tensor_size * division.data_size
    return replace(job, time=job.time + messages, message=cluster.network.message(hidden / along, stride=stride))


def _least_seconds(job: Job) -> float:
    """Return a lower bound of a step's time: all stages work all the time."""
    parts = [*job.time.layers, job.time.embedding, job.time.head]
    return job.num_microbatches * sum(part.total for part in parts) / job.num_stages


def _planned(config: RunConfig, job: Job, cluster: Cluster) -> Parallelism | None:
    """Return the best split, with recomputation only if it does not fit without it; None if it does not fit at all."""
    for recompute in (config.recompute, RECOMPUTE_ALL):
        try:
            changed = replace(job, recompute=recompute)
            plan = balanced_plan(changed)
        except PipelinePlanError:
            continue
        layers = plan.counts if job.num_stages > 1 else None
        parallel = replace(config.parallel, pipeline_stage_layers=layers)
        seconds = plan.seconds + _not_hidden(changed, plan, cluster.network)
        return Parallelism(replace(config, parallel=parallel, recompute=recompute), changed, plan, seconds)
    return None


def _not_hidden(job: Job, plan: Plan, network: Network) -> float:
    """Return the seconds of the replicas' messages that computation does not hide. One micro-batch's forward pass hides
    those of parameters, its backward pass those of gradients."""

    def of(stage: int, trainable: float) -> float:
        messages = replicas_time(trainable / job.division.tensor_size, job.division, network)
        gather = messages.forward - plan.stage_forward[stage]
        return max(0.0, gather) + max(0.0, messages.backward - plan.stage_backward[stage])

    return max(of(stage, chunk.held.trainable) for stage, chunk in enumerate(job.chunks(plan.counts)))
