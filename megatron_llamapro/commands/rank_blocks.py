"""Score every block on held-out sets by forward passes, and choose the blocks to copy: those that matter least to what
the model knows.

llamapro rank-blocks --checkpoint llama-2-7b-hf --known english=data/english python=data/python --new cpp=data/cpp
    --num_added_blocks 8 --picture blocks.png

Two scores: left_out is how much a set's loss increases without the block, stream_change how much the block changes the
residual stream. The printed --positions are those for `llamapro convert`. docs/keeping.md states the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llamapro.checkpoint.description import DescribedModel
from megatron_llamapro.commands.evaluation_options import (
    add_evaluation_options,
    job_of,
    read_new_and_known,
    started_world,
)
from megatron_llamapro.config.command import CommandParser, is_first_rank
from megatron_llamapro.config.files import check_output, write_json
from megatron_llamapro.config.pictures import check_picture
from megatron_llamapro.evaluation.ranking import BlockScore, Ranking
from megatron_llamapro.expansion.plan import placed_positions
from megatron_llamapro.expansion.trainable_part import TrainablePart
from megatron_llamapro.planning.flops import step_work
from megatron_llamapro.runtime.launched import launched_world_size

if TYPE_CHECKING:
    from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint

DEFAULT_NUM_SAMPLES = 32  # a pass per block over all of them


def main(arguments: Sequence[str]) -> int:
    """Score the blocks, print the table, the positions and their costs, draw, write the JSON."""
    args = _parser().parse_args(arguments)
    new, known = read_new_and_known(args)
    job = job_of(args, {**known, **new})

    def read() -> tuple:
        from megatron_llamapro.checkpoint.formats.open import open_checkpoint

        check_output(args.output, overwrite=args.overwrite)
        check_picture(args.picture, overwrite=args.overwrite)
        checkpoint = open_checkpoint(args.checkpoint)
        evenly = placed_positions(checkpoint.shape.num_layers, args.num_added_blocks)  # refuses impossible numbers
        return checkpoint, evenly, job.check([checkpoint], world_size=launched_world_size())

    with started_world(read) as (checkpoint, evenly, token_files):
        from megatron_llamapro.evaluation.blocks import score_blocks
        from megatron_llamapro.evaluation.picture import draw_blocks
        from megatron_llamapro.evaluation.results import settings_json

        scores = score_blocks(checkpoint, job, token_files)
    if is_first_rank():
        ranking = Ranking(scores, [*known], [*new], BlockScore(args.by), args.num_added_blocks)
        placements = {"ranked": ranking.positions, "interleaved": evenly}
        costs = {
            name: _flops_per_token(checkpoint, positions, seq_length=job.seq_length)
            for name, positions in placements.items()
        }
        print(ranking.table())
        print("\n".join(_lines(checkpoint, placements, costs)))
        if args.output:
            content = {
                **settings_json(job, token_files),
                "checkpoint": str(checkpoint.folder),
                **ranking.to_json(),
                "training_flops_per_token": costs,
            }
            write_json(args.output, content)
        if args.picture:
            draw_blocks(ranking, args.picture)
    return 0


def _flops_per_token(checkpoint: Checkpoint, positions: Sequence[int], *, seq_length: int) -> float:
    """Return the FLOPs per token of training whole blocks added at these positions, and nothing else."""
    expanded = DescribedModel.expanded(checkpoint.shape, checkpoint.plan.expand(positions))
    return step_work(expanded.shape, seq_length=seq_length, trains=TrainablePart(frozenset(positions))).total


def _lines(checkpoint: Checkpoint, placements: Mapping[str, Sequence[int]], costs: Mapping[str, float]) -> list[str]:
    """Return what each placement costs. Below its first added block there is no backward pass."""
    lines = []
    for name, positions in placements.items():
        num_blocks = checkpoint.shape.num_layers + len(positions)
        lines.append(
            f"{name}: --positions {','.join(map(str, positions))} takes {costs[name] / 1e9:,.3f} GFLOP per token to "
            f"train, with backward passes through {num_blocks - positions[0]} of {num_blocks} blocks"
        )
    return lines


def _parser() -> CommandParser:
    parser = CommandParser(prog="llamapro rank-blocks", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="the model to expand, in any format, or a run"
    )
    parser.add_argument(
        "--known",
        nargs="+",
        required=True,
        metavar="NAME=PREFIX",
        help="held-out sets of what the model knows; they alone decide",
    )
    parser.add_argument("--new", nargs="+", metavar="NAME=PREFIX", help="held-out sets of the new domain, to compare")
    parser.add_argument(
        "--num_added_blocks", type=int, required=True, metavar="N", help="number of blocks to choose for copying"
    )
    parser.add_argument(
        "--by",
        choices=[score.value for score in BlockScore],
        default=BlockScore.LEFT_OUT.value,
        help=f"the score that decides (default: {BlockScore.LEFT_OUT.value})",
    )
    add_evaluation_options(parser, num_samples=DEFAULT_NUM_SAMPLES)
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw that score of every block")
    return parser
