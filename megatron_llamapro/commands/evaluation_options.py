"""Options that evaluate, sweep and rank-blocks share: how sets are read, and how the model is divided."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from megatron_llamapro.config.command import CommandParser, is_first_rank
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import DataFormat, ParallelConfig, Precision
from megatron_llamapro.config.values import expand_user, spelled_as

if TYPE_CHECKING:
    from megatron_llamapro.evaluation.job import EvaluationJob

DEFAULT_SEQ_LENGTH = 2048
Read = TypeVar("Read")


def add_evaluation_options(parser: CommandParser, *, num_samples: int | None = None) -> None:
    """Add the options of reading sets, of dividing the model, and --output. `num_samples` is the default; None means
    all."""
    parser.add_argument(
        "--seq_length",
        type=int,
        default=DEFAULT_SEQ_LENGTH,
        metavar="N",
        help=f"tokens per sample (default: {DEFAULT_SEQ_LENGTH})",
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        default=num_samples,
        metavar="N",
        help=f"samples of each set, evenly spaced (default: {num_samples or 'all'})",
    )
    parser.add_argument(
        "--micro_batch_size", type=int, default=1, metavar="N", help="samples per forward pass (default: 1)"
    )
    parser.add_argument(
        "--format",
        choices=get_args(DataFormat),
        default="text",
        help="chat: sets of conversations, with loss on the answers only (default: text)",
    )
    parser.add_argument(
        "--precision",
        type=partial(spelled_as, get_args(Precision)),
        choices=get_args(Precision),
        help="default: the checkpoint's; fp32 for float16",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer of the sets (default: the checkpoint's)"
    )
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="under torchrun (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def job_of(args: argparse.Namespace, sets: dict[str, str]) -> EvaluationJob:
    """Return the evaluation that the options describe. Raises `ConfigError` if a number is out of range."""
    from megatron_llamapro.evaluation.job import EvaluationJob

    return EvaluationJob(
        sets=sets,
        seq_length=args.seq_length,
        num_samples=args.num_samples,
        micro_batch_size=args.micro_batch_size,
        parallel=ParallelConfig(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        ),
        precision=args.precision,
        data_format=args.format,
        tokenizer=args.tokenizer,
    )


def read_sets(words: Sequence[str], *, option: str = "--set") -> dict[str, str]:
    """Read words such as cpp=data/cpp.held_out.

    Raises:
        ConfigError: a word has no name or no prefix, or a name stands twice.
    """
    sets: dict[str, str] = {}
    for word in words:
        name, _, prefix = word.partition("=")
        if not name or not prefix:
            raise ConfigError(f"{option}: '{word}' is not NAME=PREFIX, e.g. cpp=data/cpp.held_out")
        if name in sets:
            raise ConfigError(f"{option} names '{name}' twice: give each set its own name")
        sets[name] = _prefix(prefix)
    return sets


def read_new_and_known(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Read --new, which may be missing, and --known.

    Raises:
        ConfigError: as in `read_sets`, or a set is in both.
    """
    new, known = read_sets(args.new or (), option="--new"), read_sets(args.known, option="--known")
    if both := sorted({*new} & {*known}):
        raise ConfigError(f"'{both[0]}' is in --new and in --known: a set is one or the other")
    return new, known


def _prefix(text: str) -> str:
    try:
        return expand_user(text)
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from None


@contextmanager
def started_world(read: Callable[[], Read]) -> Iterator[Read]:
    """Start the world, end it after the block, and give every rank what `read` returns on the first.

    The first rank reads before torch is imported, so that wrong input is reported at once.
    """
    on_first_rank = read() if is_first_rank() else None

    from megatron_llamapro.runtime.distributed import ask_first_rank
    from megatron_llamapro.runtime.world import running_world

    with running_world():
        yield ask_first_rank(lambda: on_first_rank)
