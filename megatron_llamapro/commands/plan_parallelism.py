"""Find the fastest parallel layouts of a job: how many tensor-parallel ranks, pipeline stages and replicas.

llamapro plan-parallelism --config run.yaml --world_size 64 [--memory_gib 70] [--output parallel.yaml] [--json]

The model need not be converted yet: --hf_config DIR --num_added_blocks N. Batch sizes come from the configuration. Any
of its fields can be overridden by its dotted name, as in train. docs/planning.md lists the assumptions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_llamapro.checkpoint.description import describe_model
from megatron_llamapro.commands.options import (
    add_duration_options,
    add_job_options,
    check_duration_options,
    read_expansion_options,
)
from megatron_llamapro.config.command import CommandParser, check_positive
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.config.io import parse_run_config, to_plain
from megatron_llamapro.config.values import GIB
from megatron_llamapro.planning.job import run_cost
from megatron_llamapro.planning.network import Network
from megatron_llamapro.planning.parallelism import Cluster, Parallelism, best_parallelisms

GB = 1e9

# Options about a rank, besides those of every planning command: option, type, default, metavar, help.
RANK_OPTIONS = (
    ("memory_gib", float, 70, "GIB", "memory limit of a rank (default: 70, on an 80 GB GPU)"),
    ("ranks_per_node", int, Network.ranks_per_node, "N", "ranks per node (default: 8)"),
    ("within_node_gb", float, Network.within_node / GB, "N", "GB/s per rank within a node (default: NVLink)"),
    ("between_nodes_gb", float, Network.between_nodes / GB, "N", "GB/s per rank between nodes (default: 400 Gbit/s)"),
    ("at_most", int, 5, "N", "layouts to print (default: 5)"),
)


def main(arguments: Sequence[str]) -> int:
    """Read the options, search, print the best layouts, write the first if asked."""
    parser = CommandParser(prog="llamapro plan-parallelism", description=__doc__)
    add_job_options(parser)
    add_duration_options(parser)
    for name, kind, default, metavar, text in RANK_OPTIONS:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    args, run_args = parser.parse_own_args(arguments)
    config, expansion = parse_run_config(run_args), read_expansion_options(parser, args)
    check_duration_options(args)
    check_positive(args, *(name for name, *_ in RANK_OPTIONS))
    model = describe_model(Path(config.model.checkpoint), hf_config=args.hf_config, expansion=expansion)
    cluster = Cluster(
        num_ranks=args.world_size,
        flops_per_second=args.peak_tflops * 1e12 * args.efficiency,
        memory_bytes=args.memory_gib * GIB,
        network=Network(args.ranks_per_node, args.within_node_gb * GB, args.between_nodes_gb * GB),
    )
    found = best_parallelisms(config, model, cluster, at_most=args.at_most)
    if args.json:
        print(json.dumps([_as_json(each, args) for each in found], indent=2))
    else:
        print("\n".join(_lines(found, args)))
    if args.output:
        write_atomically(args.output, yaml.safe_dump(_fields(found[0]), sort_keys=False))
        if not args.json:
            print(f"{args.output}: the first layout; pass it to the run as another --config")
    return 0


def _fields(found: Parallelism) -> dict[str, object]:
    """Return all configuration fields of a layout, even unset ones: they override those of the file that they are added
    to."""
    names = {
        "parallel": (
            "tensor_model_parallel_size",
            "sequence_parallel",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "pipeline_stage_layers",
            "overlap_grad_reduce",
            "overlap_param_gather",
        ),
        "recompute": ("granularity", "method", "num_layers", "modules"),
    }
    return {
        section: {name: to_plain(getattr(getattr(found.config, section), name)) for name in fields}
        for section, fields in names.items()
    }


def _as_json(found: Parallelism, args: argparse.Namespace) -> dict[str, object]:
    whole = vars(run_cost(found.job, found.seconds, peak_tflops=args.peak_tflops, tokens=args.tokens))
    figures = {"data_parallel_size": found.job.division.data_size, "seconds": found.seconds}
    return {**_fields(found), **figures, "memory_bytes": found.memory_bytes, "bubble": found.plan.bubble, **whole}


def _lines(found: list[Parallelism], args: argparse.Namespace) -> Iterator[str]:
    division = found[0].job.division
    batch = found[0].config.training.global_batch_size
    yield (
        f"{args.world_size:,} ranks on nodes of {args.ranks_per_node}, {args.memory_gib:g} GiB a rank; {batch:,} x "
        f"{division.seq_length:,} tokens a step in micro-batches of {division.micro_batch_size}; "
        f"{args.peak_tflops:g} TFLOP/s x {args.efficiency:g}, {args.within_node_gb:g} GB/s within a node, "
        f"{args.between_nodes_gb:g} GB/s between nodes"
    )
    yield ""
    yield (
        "TP x PP x DP     recompute  GiB a rank  step, s  tokens/s a rank    MFU  "
        f"GPU-hours for {args.tokens / 1e9:g} B tokens"
    )
    for each in found:
        whole = run_cost(each.job, each.seconds, peak_tflops=args.peak_tflops, tokens=args.tokens)
        yield (
            f"{name(each):<17}{each.config.recompute.granularity or 'no':<9}{each.memory_bytes / GIB:>12.1f}"
            f"{each.seconds:>9.2f}{whole.tokens_per_second / args.world_size:>17,.0f}"
            f"{whole.model_flops_utilization:>7.1%}{whole.gpu_hours:>11,.0f}"
        )
    if found[0].config.parallel.pipeline_stage_layers:
        yield f"layers on the stages of {name(found[0])}: {', '.join(map(str, found[0].plan.counts))}"


def name(found: Parallelism) -> str:
    """Return the layout as people write it: `2 x 4 x 8`."""
    division = found.job.division
    return f"{division.tensor_size} x {found.job.num_stages} x {division.data_size}"
