"""Reports of dry runs, for people and for programs, next to the arithmetic of planning/flops.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.config.pipeline_stages import draw, stage_layers
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.config.values import GIB, binary_size
from megatron_llamapro.dry_run.counting import Kind, Product
from megatron_llamapro.dry_run.run import RankReport
from megatron_llamapro.planning.job import job_of
from megatron_llamapro.training.report import work_per_token

_SCALARS = 4096  # bytes: smaller collectives carry norms, losses and counts, and get no line


def to_json(
    config: RunConfig, model: DescribedModel, reports: Sequence[RankReport], *, world_size: int
) -> dict[str, object]:
    """Return counted bytes and FLOPs: FLOPs per token, messages per micro-batch, all else per step."""
    arithmetic = arithmetic_of(config, model, world_size=world_size)
    return {
        "world_size": world_size,
        "parameters": sum(report.stage_report.num_stage_parameters for report in first_of_stages(reports)),
        "trainable_parameters": sum(report.stage_report.num_stage_trainable for report in first_of_stages(reports)),
        "arithmetic_flops_per_token": work_per_token(config, model.shape, model.plan).total,
        "ranks": [rank_json(report, arithmetic[report.stage]) for report in reports],
    }


def rank_json(report: RankReport, arithmetic: Arithmetic) -> dict[str, object]:
    """Return one rank's figures for programs."""
    counts = report.counts
    return {
        "rank": report.rank,
        "stage": report.stage,
        "layers": report.stage_report.num_layers,
        "trainable_layers": list(report.stage_report.trainable_layers),
        "parameters": report.stage_report.num_parameters,
        "trainable_parameters": report.stage_report.num_trainable,
        "held_bytes": {kind.value: report.held_bytes.get(kind, 0) for kind in Kind},
        "peak_bytes": counts.peak_bytes,
        "peak_bytes_by_kind": {kind.value: counts.peak_by_kind.get(kind, 0) for kind in Kind},
        "saved_bytes_per_microbatch": report.saved_bytes,
        "flops_per_token": {product.value: counts.flops[product] / report.tokens for product in Product},
        "collective_bytes": {f"{group} {what}": size for (group, what), size in counts.sent_bytes.items()},
        "message_bytes_per_microbatch": messages(report),
        "largest_at_peak": [
            {"number": number, "bytes": size, "kind": held.kind.value, "what": held.label}
            for number, size, held in report.largest
        ],
        "cost_model": asdict(arithmetic),
        "seconds": report.seconds,
    }


def heading(config: RunConfig, model: DescribedModel, *, world_size: int) -> str:
    """Return the layout and the sizes of the job as text."""
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return (
        f"{draw(stage_layers(parallel, model.shape.num_layers), set(model.plan.added_layers), num_stages=stages)}\n"
        f"{world_size:,} ranks: TP {tensor} x PP {stages} x DP {world_size // (tensor * stages)}; micro-batch "
        f"{config.training.micro_batch_size} x {config.data.seq_length} tokens; {config.training.precision}"
    )


@dataclass(frozen=True)
class Arithmetic:
    """The cost model's figures for one rank."""

    held_bytes: float
    """Weights, gradients, master weights and moments."""
    saved_bytes: float
    """Activations that a micro-batch keeps for its backward pass."""
    flops_per_token: float
    """Includes recomputation."""


def arithmetic_of(config: RunConfig, model: DescribedModel, *, world_size: int) -> list[Arithmetic]:
    """Return the cost model's figures by stage, equal for all of a stage's ranks (planning/job.py)."""
    tokens = config.training.micro_batch_size * config.data.seq_length  # so that a second is a FLOP per token
    job = job_of(config, model.shape, model.plan, world_size=world_size, flops_per_second=tokens)
    chunks = job.chunks(stage_layers(config.parallel, model.shape.num_layers))
    return [
        Arithmetic(
            held_bytes=sum(chunk.held.state for chunk in mine),
            saved_bytes=sum(chunk.held.activations for chunk in mine),
            flops_per_token=sum(chunk.time.total for chunk in mine),
        )
        for mine in (chunks[stage :: job.num_stages] for stage in range(job.num_stages))
    ]


def describe(config: RunConfig, report: RankReport, arithmetic: Arithmetic, *, world_size: int) -> str:
    """Return one rank's figures as text."""
    alike = world_size // config.parallel.pipeline_model_parallel_size
    stage, counts, held = report.stage_report, report.counts, report.held_bytes
    trainable = ", ".join(map(str, stage.trainable_layers)) or "none"
    lines = [
        f"stage {report.stage}, rank {report.rank} of {alike} equal ranks: {stage.num_layers} blocks, trainable in "
        f"{trainable}; {stage.num_trainable:,} of {stage.num_parameters:,} parameters",
        f"  held      {binary_size(sum(held.values()))}: {_kinds(held)}",
        f"  peak      {binary_size(counts.peak_bytes)}: {_kinds(counts.peak_by_kind)}",
    ]
    lines.append(f"  keeps     {binary_size(report.saved_bytes)} of activations for the backward pass of a micro-batch")
    flops = [f"{product.value} {count / report.tokens / 1e9:.2f}" for product, count in counts.flops.items()]
    lines.append(f"  executes  {counts.flops.total() / report.tokens / 1e9:.2f} GFLOP per token: {', '.join(flops)}")
    sent = [
        f"{group} {what} {binary_size(size)}" for (group, what), size in counts.sent_bytes.items() if size > _SCALARS
    ]
    lines.append(f"  a step    {', '.join(sent) or 'nothing reduced or gathered'}")
    if config.parallel.pipeline_model_parallel_size > 1:
        sizes = [f"{what} {binary_size(size)}" for what, size in messages(report).items()]
        lines.append(f"  messages  per micro-batch: {', '.join(sizes)}")
    lines.append(
        f"  the cost model: holds {binary_size(arithmetic.held_bytes)}, "
        f"keeps {binary_size(arithmetic.saved_bytes)}, executes {arithmetic.flops_per_token / 1e9:.2f} GFLOP per token"
    )
    for number, size, held in report.largest:
        lines.append(f"  {number:>7} x {held.label} ({held.kind.value}): {binary_size(size)}")
    return "\n".join(lines)


def _kinds(sizes: Mapping[Kind, int]) -> str:
    return ", ".join(f"{kind.value} {binary_size(sizes[kind])}" for kind in Kind if sizes.get(kind))


def messages(report: RankReport) -> dict[str, float]:
    """Return bytes per micro-batch, sent to the next stage and to the previous one."""
    return {what: report.message_bytes.get(what, 0) / report.num_microbatches for what in ("activations", "gradients")}


def first_of_stages(reports: Sequence[RankReport]) -> list[RankReport]:
    """Return one report per stage."""
    return list({report.stage: report for report in reversed(reports)}.values())


def total_line(config: RunConfig, model: DescribedModel, reports: Sequence[RankReport]) -> str:
    """Return the line that compares all stages' work with the arithmetic, or a hint if a stage was not run."""
    if len(first_of_stages(reports)) < config.parallel.pipeline_model_parallel_size:
        return "not every stage was run: --ranks all shows the whole model's work"
    counted = sum(_without_recomputed(report) / report.tokens for report in first_of_stages(reports))
    arithmetic = work_per_token(config, model.shape, model.plan).total
    counted *= config.parallel.tensor_model_parallel_size
    return (
        f"all stages execute {counted / 1e9:.2f} GFLOP per token without recomputation; the arithmetic says "
        f"{arithmetic / 1e9:.2f}"
    )


def _without_recomputed(report: RankReport) -> int:
    return sum(count for product, count in report.counts.flops.items() if "recomputed" not in product.value)


def too_large(reports: Sequence[RankReport], memory_gib: float) -> list[str]:
    """Return a line for every rank that would not fit."""
    return [
        f"rank {report.rank} (stage {report.stage}) needs {report.counts.peak_bytes / GIB:.2f} GiB at its peak: "
        f"{report.counts.peak_bytes / GIB - memory_gib:.2f} GiB more than {memory_gib:g}"
        for report in reports
        if report.counts.peak_bytes > memory_gib * GIB
    ]
