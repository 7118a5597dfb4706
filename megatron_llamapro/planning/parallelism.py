"""How a job's ranks are best divided: tensor-parallel x stages x replicas, by the arithmetic of this room.

Every division is a configuration of its own, checked as a run's is; its layers are split as `planning/splits.py` does,
and its messages take what `planning/network.py` says. Needs no torch.
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
    """What a job runs on."""

    num_ranks: int
    flops_per_second: float
    """That a rank really reaches."""
    memory_bytes: float
    """That a rank may hold."""
    network: Network


@dataclass(frozen=True)
class Parallelism:
    """One division, and what a step takes with it."""

    config: RunConfig
    job: Job
    plan: Plan
    seconds: float
    """Of a step, with what of the replicas' messages is not hidden; without the optimizer's update."""

    @property
    def memory_bytes(self) -> float:
        """Of the stage that holds the most."""
        return max(self.plan.stage_bytes)


def best_parallelisms(config: RunConfig, model: DescribedModel, cluster: Cluster, *, at_most: int) -> list[Parallelism]:
    """The divisions with the least step time that fit, the best first. What `config` says of parallel and recompute is
    replaced; its batch sizes are kept.

    Raises:
        ConfigError: the model cannot be trained as configured, or no division divides the ranks and the batch too.
        PipelinePlanError: none fits into memory.
    """
    check_fits(_undivided(config), model.shape, model.plan)
    if cluster.num_ranks < cluster.network.ranks_per_node:  # a part of a node is a node
        network = replace(cluster.network, ranks_per_node=cluster.num_ranks)
        cluster = replace(cluster, network=network)
    jobs = sorted(_jobs(config, model, cluster), key=lambda each: _least_seconds(each[1]))
    if not jobs:
        raise ConfigError(
            f"{cluster.num_ranks} ranks, training.global_batch_size {config.training.global_batch_size} and "
            f"micro_batch_size {config.training.micro_batch_size}: no division of the ranks divides the batch too"
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
            f"no division of {cluster.num_ranks} ranks fits into {cluster.memory_bytes / GIB:g} GiB a rank: the "
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
    """Tensor-parallel ranks within a node; replicas overlap their messages with work."""
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
    """A step cannot take less: all stages work all the time."""
    parts = [*job.time.layers, job.time.embedding, job.time.head]
    return job.num_microbatches * sum(part.total for part in parts) / job.num_stages


def _planned(config: RunConfig, job: Job, cluster: Cluster) -> Parallelism | None:
    """The best split, with recomputation where it fits only so; None where it does not fit at all."""
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
    """Seconds of the replicas' messages that are longer than what they hide behind: a micro-batch's forward pass for
    the parameters, its backward pass for the gradients."""

    def of(stage: int, trainable: float) -> float:
        messages = replicas_time(trainable / job.division.tensor_size, job.division, network)
        gather = messages.forward - plan.stage_forward[stage]
        return max(0.0, gather) + max(0.0, messages.backward - plan.stage_backward[stage])

    return max(of(stage, chunk.held.trainable) for stage, chunk in enumerate(job.chunks(plan.counts)))
