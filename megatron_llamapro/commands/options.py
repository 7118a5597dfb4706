"""Options that several commands share: of writing checkpoints, of added blocks, and of planning a job."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.checkpoint.report import byte_bar
from megatron_llamapro.checkpoint.tensors.layout import DEFAULT_MAX_SHARD_BYTES
from megatron_llamapro.config.command import CommandParser, check_positive
from megatron_llamapro.config.errors import ConfigError, ExpansionError
from megatron_llamapro.config.files import check_can_hold
from megatron_llamapro.config.values import LARGEST_VOCAB_MULTIPLE, spelled_as
from megatron_llamapro.expansion.plan import Placement
from megatron_llamapro.expansion.round import Expansion, Init
from megatron_llamapro.families.hf_config import WEIGHT_DTYPES
from megatron_llamapro.planning.job import EFFICIENCY, PEAK_TFLOPS, TOKENS

if TYPE_CHECKING:
    from megatron_llamapro.checkpoint.convert import Options, TargetKind
    from megatron_llamapro.checkpoint.dial import DialSetting


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
    add_dtype_option(parser)


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add --dtype."""
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


def add_dial_options(parser: argparse.ArgumentParser) -> None:
    """Add --added_block_scale and --original."""
    group = parser.add_argument_group("dial")
    group.add_argument(
        "--added_block_scale",
        type=_scales,
        metavar="0.75",
        help="W0 + scale * (W1 - W0), from 0 (the original) through 1 (as trained) to 2: scales the output projections "
        "of added blocks, and what training changed in others. One value, or one for each added block: 0.5,1,0.75",
    )
    group.add_argument(
        "--original",
        type=Path,
        metavar="DIR",
        help="the model before training, in any format: needed if original weights were trained, unless the run's base "
        "has them",
    )


def read_dial_options(parser: CommandParser, args: argparse.Namespace) -> DialSetting | None:
    """Return the dial that the options ask for, or None for none. Contradictory options end the program with a usage
    error."""
    from megatron_llamapro.checkpoint.dial import DialSetting

    if args.added_block_scale is not None:
        return DialSetting(args.added_block_scale, args.original)
    if args.original is not None:
        parser.error("--original needs --added_block_scale: without it nothing is dialed")
    return None


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


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add --format and --max_shard_size, for commands whose result has either format."""
    parser.add_argument(
        "--format",
        choices=("hugging_face", "torch_dist"),
        default="hugging_face",
        help="hugging_face (default): safetensors; torch_dist: a Megatron checkpoint, e.g. to train it further",
    )
    add_shard_option(parser)


def read_result_options(parser: CommandParser, args: argparse.Namespace) -> TargetKind:
    """Return the format of `add_result_options`. Contradictory options end the program with a usage error."""
    from megatron_llamapro.checkpoint.convert import TORCH_DIST, hugging_face

    if args.format == "hugging_face":
        return hugging_face(args.max_shard_bytes)
    if args.max_shard_bytes != DEFAULT_MAX_SHARD_BYTES:
        parser.error("--max_shard_size is for --format hugging_face")
    return TORCH_DIST


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


def _integers(text: str, *, called: str, least: float = float("-inf")) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {called}")
    return values


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of scales such as 0.75 or 0.5,1,0.75") from None


_counts = partial(_integers, called="counts such as 12,10,10,8", least=0)
_layer_indices = partial(_integers, called="layer indices such as 4,9,14")


def add_expansion_options(parser: argparse.ArgumentParser) -> None:
    """Add --num_added_blocks, --placement, --blocks_per_group, --init, --init_seed, --force and --positions."""
    group = parser.add_argument_group("added blocks")
    group.add_argument(
        "--num_added_blocks",
        type=int,
        metavar="N",
        help="blocks to add; interleaved blocks are spread as evenly as N allows",
    )
    group.add_argument(
        "--placement",
        choices=[placement.value for placement in Placement],
        help="interleaved (the paper's, default): a copy after every group of blocks; prefix: copies of the first N "
        "blocks before block 0; suffix: copies of the last N blocks after the last",
    )
    group.add_argument(
        "--blocks_per_group",
        type=int,
        metavar="P",
        help="interleaved: copy the last P blocks of a group after it (default: 1); P must divide N",
    )
    group.add_argument(
        "--init",
        choices=[init.value for init in Init],
        help="initial weights of an added block. copy (the paper's, default): its source block; random; mean: the mean "
        "of its source and the next block; all with zeroed output projections. zero_norm: a copy with zeroed norms",
    )
    group.add_argument("--init_seed", type=int, metavar="N", help="seed of --init random (default: 0)")
    group.add_argument("--force", action="store_true", help="allow --init zero_norm, which cannot learn")
    group.add_argument(
        "--positions",
        type=_layer_indices,
        metavar="4,9,14",
        help="instead of a number and a placement: layer indices of the added blocks in the expanded model, from 0, "
        "ascending",
    )


def read_expansion_options(parser: CommandParser, args: argparse.Namespace) -> Expansion | None:
    """Return the expansion that the options ask for, or None for no added blocks. Contradictory options end the
    program with a usage error.

    Raises:
        ExpansionError: an init that cannot learn.
    """
    if not _asks_for_blocks(parser, args):
        given = [name for name in ("init", "init_seed") if getattr(args, name) is not None]
        if given:
            parser.error(f"--{given[0]} needs --num_added_blocks or --positions")
        return None
    init = Init(args.init or Init.COPY.value)
    if args.init_seed is not None and init is not Init.RANDOM:
        parser.error(f"--init_seed is for --init random: {init.value} uses no random numbers")
    if (args.init_seed or 0) < 0:
        parser.error(f"--init_seed is {args.init_seed}: it cannot be negative")
    check_init(init, force=args.force)
    return Expansion(
        positions=args.positions,
        num_added_blocks=args.num_added_blocks,
        placement=Placement(args.placement or Placement.INTERLEAVED.value),
        blocks_per_group=1 if args.blocks_per_group is None else args.blocks_per_group,
        init=init,
        seed=args.init_seed or 0,
    )


def check_init(init: Init, *, force: bool) -> None:
    """Raise `ExpansionError` if blocks with this initialisation cannot learn in any known family, unless `force`."""
    if init is Init.ZERO_NORM and not force:
        raise ExpansionError(
            "init zero_norm cannot learn in a SwiGLU block: with its input at 0 the feed-forward is of second order, "
            "so its norm's gradient stays 0 (arXiv 2401.02415, section 3.2): use copy, or give --force to compare"
        )


def _asks_for_blocks(parser: CommandParser, args: argparse.Namespace) -> bool:
    counted = [
        name for name in ("num_added_blocks", "placement", "blocks_per_group") if getattr(args, name) is not None
    ]
    if args.positions is not None and counted:
        parser.error(f"--positions already places every added block: leave out --{counted[0]}")
    if args.positions is None and args.num_added_blocks is None and counted:
        parser.error(f"--{counted[0]} needs --num_added_blocks")
    return args.positions is not None or args.num_added_blocks is not None


def add_job_options(parser: CommandParser) -> None:
    """Add --world_size, --hf_config, --json and the options for added blocks."""
    parser.add_argument("--world_size", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--hf_config", type=Path, metavar="DIR", help="folder of a model that is not converted yet (config.json)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds, bytes and FLOPs")
    add_expansion_options(parser)


def add_duration_options(parser: CommandParser) -> None:
    """Add the assumptions about a rank and the run, and --output."""
    parser.add_argument(
        "--tokens", type=float, default=TOKENS, metavar="N", help="training tokens (default: the paper's 80e9)"
    )
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=PEAK_TFLOPS,
        metavar="N",
        help="peak TFLOP/s of a rank (default: H100, bf16)",
    )
    parser.add_argument(
        "--efficiency", type=float, default=EFFICIENCY, metavar="PART", help="fraction of the peak that a block reaches"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.yaml", help="write the best one, as another --config of the run"
    )


def check_duration_options(args: argparse.Namespace) -> None:
    """Raise `ConfigError` if --world_size or an option of `add_duration_options` has an impossible value."""
    check_positive(args, "world_size", "peak_tflops", "efficiency", "tokens")
    check_can_hold(args.output)
    if args.efficiency > 1:
        raise ConfigError(f"--efficiency is {args.efficiency:g}: it must be at most 1, e.g. 0.4")
