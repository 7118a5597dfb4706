"""Options shared by the commands that write checkpoints."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from megatron_llamapro.checkpoint.report import byte_bar
from megatron_llamapro.checkpoint.tensors.layout import DEFAULT_MAX_SHARD_BYTES
from megatron_llamapro.commands.expansion_options import add_expansion_options, read_expansion_options
from megatron_llamapro.config.command import CommandParser
from megatron_llamapro.config.values import LARGEST_VOCAB_MULTIPLE, spelled_as
from megatron_llamapro.families.hf_config import WEIGHT_DTYPES

if TYPE_CHECKING:
    from megatron_llamapro.checkpoint.convert import Options, TargetKind


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite, --resume and --num_workers."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing target, once the new one is complete"
    )
    parser.add_argument("--resume", action="store_true", help="continue an earlier, interrupted run to this target")
    add_workers_option(parser)


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Add --num_workers."""
    parser.add_argument(
        "--num_workers",
        type=_num_workers,
        default=0,
        metavar="N",
        help="threads (default: two per core, at most eight)",
    )


@contextmanager
def writing_options(description: str, args: argparse.Namespace) -> Iterator[Options]:
    """Yield the options of `add_writing_options`, with a progress bar. An interrupt says how to continue."""
    from megatron_llamapro.checkpoint.convert import Options

    try:
        with byte_bar(description) as bar:
            yield Options(
                overwrite=args.overwrite,
                resume=args.resume,
                num_workers=args.num_workers,
                progress=bar.progress,
                on_total=bar.on_total,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("to continue, run the same command with --resume") from None


def add_change_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that change the model: added blocks and --dtype."""
    add_expansion_options(parser)
    parser.add_argument(
        "--dtype",
        type=partial(spelled_as, WEIGHT_DTYPES),
        choices=WEIGHT_DTYPES,
        help="cast the weights (default: keep the source's type)",
    )


def read_change_options(parser: CommandParser, args: argparse.Namespace) -> dict:
    """Return the options of `add_change_options`, as keyword arguments of a conversion. Raises the errors of
    `read_expansion_options`."""
    return {"expansion": read_expansion_options(parser, args), "dtype": args.dtype}


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Add --max_shard_size."""
    parser.add_argument(
        "--max_shard_size",
        type=_num_bytes,
        default=DEFAULT_MAX_SHARD_BYTES,
        dest="max_shard_bytes",
        metavar="SIZE",
        help="size limit of a safetensors file, e.g. 5GB or 500MB (default: 5GB)",
    )


def _num_workers(text: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", text) or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of threads")
    return int(text)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]


# Options for legacy checkpoints only: name, type, metavar, help.
_LEGACY = (
    ("tensor_model_parallel_size", int, "N", "tensor-parallel ranks (default: 1)"),
    ("pipeline_model_parallel_size", int, "N", "pipeline stages (default: 1)"),
    ("virtual_pipeline_model_parallel_size", int, "N", "chunks per stage, for the interleaved schedule"),
    (
        "make_vocab_size_divisible_by",
        int,
        "N",
        "pad the vocabulary to a multiple of N times the ranks (default: 128)",
    ),
)


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """Add --format and the options that lay out a legacy checkpoint."""
    group = parser.add_argument_group("format")
    group.add_argument(
        "--format",
        choices=("torch_dist", "legacy"),
        default="torch_dist",
        help="torch_dist (default) loads in any parallel layout; legacy (mp_rank_… files) loads in one",
    )
    for name, kind, metavar, text in _LEGACY:
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"legacy: {text}")
    group.add_argument(
        "--pipeline_stage_layers",
        type=_counts,
        metavar="12,10,10,8",
        help="legacy: layers of each stage, first to last; with chunks, chunk 0 of every stage, then chunk 1, … "
        "(default: as even as possible)",
    )
    group.add_argument(
        "--layer_spec",
        choices=("local", "transformer_engine"),
        help="legacy: implementation of the layers that will load it; it sets the names of norms (default: local)",
    )


def read_format_options(parser: CommandParser, args: argparse.Namespace) -> TargetKind:
    """Return the format to write. Options that contradict each other end the program with a usage error."""
    from megatron_llamapro.checkpoint.convert import TORCH_DIST, legacy

    names = [name for name, *_ in _LEGACY]
    given = [name for name in (*names, "pipeline_stage_layers", "layer_spec") if getattr(args, name) is not None]
    if args.format == "torch_dist":
        if given:
            parser.error(f"--{given[0]} is for --format legacy: a torch_dist checkpoint loads in any parallel layout")
        return TORCH_DIST
    below = [name for name in names if getattr(args, name) is not None and getattr(args, name) < 1]
    if below:
        parser.error(f"--{below[0]} must be at least 1")
    if (args.make_vocab_size_divisible_by or 0) > LARGEST_VOCAB_MULTIPLE:
        parser.error(f"--make_vocab_size_divisible_by must be at most {LARGEST_VOCAB_MULTIPLE}")
    return legacy(**{name: getattr(args, name) for name in given})


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = (-1,)
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of counts such as 12,10,10,8")
    return counts
