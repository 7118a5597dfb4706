"""Evaluate checkpoints on held-out sets: loss, perplexity and bits per byte, side by side.

llamapro evaluate --checkpoint llama-2-7b-hf runs/first --set cpp=data/cpp english=data/english

Checkpoints may be Hugging Face's or Megatron's, full or delta, or the folder of a run. A set is a pair of token files.
Several ranks: torchrun --nproc-per-node 8 -m megatron_llamapro evaluate … --tensor_model_parallel_size 2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.commands.evaluation_options import (
    add_evaluation_options,
    job_of,
    read_sets,
    started_world,
)
from megatron_llamapro.config.command import CommandParser, is_first_rank
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import check_output, write_json
from megatron_llamapro.runtime.launched import launched_world_size


def main(arguments: Sequence[str]) -> int:
    """Evaluate every checkpoint, print the table, write the JSON."""
    parser = CommandParser(prog="llamapro evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True, metavar="DIR", help="checkpoints in any format, or runs"
    )
    parser.add_argument("--label", nargs="+", help="a name for each checkpoint (default: its folder's)")
    parser.add_argument("--set", nargs="+", required=True, metavar="NAME=PREFIX", help="held-out sets: token files")
    add_evaluation_options(parser)
    args = parser.parse_args(arguments)
    labels = args.label or [_label(path, args.checkpoint) for path in args.checkpoint]
    if len(labels) != len(args.checkpoint):
        parser.error(f"--label names {len(labels)} checkpoints, --checkpoint {len(args.checkpoint)}")
    if len({*labels}) < len(labels):
        raise ConfigError(f"checkpoints have the same name, {', '.join(labels)}: give each its own with --label")
    job = job_of(args, read_sets(args.set))

    def read() -> tuple:
        from megatron_llamapro.checkpoint.formats.open import open_checkpoint

        check_output(args.output, overwrite=args.overwrite)
        opened = {label: open_checkpoint(path) for label, path in zip(labels, args.checkpoint, strict=True)}
        return opened, job.check([*opened.values()], world_size=launched_world_size())

    with started_world(read) as (checkpoints, token_files):
        from megatron_llamapro.evaluation.results import checkpoint_json, settings_json, table
        from megatron_llamapro.evaluation.run import evaluate_each

        losses = evaluate_each(checkpoints, job, token_files)
        if is_first_rank():
            print(table(losses), flush=True)
            if args.output:
                entries = [checkpoint_json(each, job, label, losses[label]) for label, each in checkpoints.items()]
                content = {**settings_json(job, token_files), "checkpoints": entries}
                write_json(args.output, content)
    return 0


def _label(path: Path, paths: Sequence[Path]) -> str:
    name = path.resolve().name
    return name if sum(other.resolve().name == name for other in paths) == 1 else str(path)
