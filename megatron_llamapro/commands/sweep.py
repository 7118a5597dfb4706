"""Turn a trained checkpoint's dial: evaluate it at several scales, and name the one that gains most at no loss.

llamapro sweep --checkpoint runs/first --new cpp=data/cpp --known english=data/english python=data/python

At scale 0 the model is the original, at 1 it is the checkpoint. Of added blocks, the dial multiplies the output
projections; of trained original weights, the change (then give --original). Export the chosen scale with
`llamapro convert megatron-to-hf --added_block_scale`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.commands.evaluation_options import (
    add_evaluation_options,
    job_of,
    read_new_and_known,
    started_world,
)
from megatron_llamapro.config.command import CommandParser, is_first_rank
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import check_output, write_json
from megatron_llamapro.config.pictures import check_picture
from megatron_llamapro.runtime.launched import launched_world_size

DEFAULT_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_TOLERANCE = 0.01


def main(arguments: Sequence[str]) -> int:
    """Evaluate every scale, print the table and the choice, draw, write the JSON."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.tolerance < 0:
        raise ConfigError(f"--tolerance is {args.tolerance:g}: it cannot be negative")
    new, known = read_new_and_known(args)
    job = job_of(args, {**new, **known})
    scales = sorted({*args.scales} - {0.0}, reverse=args.descend)
    if not scales:
        raise ConfigError("--scales has only 0, the original: name a scale above it")
    if not args.reference:
        scales.insert(0, 0.0)

    def read() -> tuple:
        from megatron_llamapro.checkpoint.formats.open import open_checkpoint
        from megatron_llamapro.evaluation.results import read_reference, settings_json

        check_output(args.output, overwrite=args.overwrite)
        check_picture(args.picture, overwrite=args.overwrite)
        checkpoint = open_checkpoint(args.checkpoint)
        original = open_checkpoint(args.original) if args.original else None
        token_files = job.check([checkpoint], world_size=launched_world_size())
        settings, reference = settings_json(job, token_files), None
        if args.reference:
            reference = read_reference(args.reference, settings, precision=job.precision_of(checkpoint))
        return checkpoint, original, token_files, settings, reference

    with started_world(read) as (checkpoint, original, token_files, settings, reference):
        from megatron_llamapro.evaluation.picture import draw_curves
        from megatron_llamapro.evaluation.results import Curve, Figures, losses_json
        from megatron_llamapro.evaluation.run import sweep

        figures: dict[float, Figures] = {0.0: reference} if reference else {}
        for scale, losses in sweep(checkpoint, job, token_files, scales=scales, original=original):
            figures[scale] = losses_json(losses)
            curve = Curve.of(figures, new=[*new], known=[*known])
            if args.descend and scale and curve.worst_known(scale) <= args.tolerance:
                break
    if is_first_rank():
        print(curve.table())
        print(curve.conclusion(args.tolerance))
        if args.output:
            content = {
                **settings,
                "checkpoint": str(checkpoint.folder),
                **curve.to_json(figures, tolerance=args.tolerance),
            }
            write_json(args.output, content)
        if args.picture:
            draw_curves([{"": curve}], args.picture, tolerance=args.tolerance)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="llamapro sweep", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="trained checkpoint in any format, or a run"
    )
    parser.add_argument(
        "--original",
        type=Path,
        metavar="DIR",
        help="the model before training, in any format; needed if original weights were trained and the run's base "
        "does not hold them",
    )
    parser.add_argument(
        "--new", nargs="+", required=True, metavar="NAME=PREFIX", help="held-out sets of the new domain"
    )
    parser.add_argument(
        "--known", nargs="+", required=True, metavar="NAME=PREFIX", help="held-out sets of what the model knew"
    )
    parser.add_argument(
        "--scales",
        type=_scales,
        default=DEFAULT_SCALES,
        metavar="0,0.5,1",
        help=f"scales to evaluate (default: {','.join(f'{scale:g}' for scale in DEFAULT_SCALES)}); 0 is always one, "
        "unless --reference is given",
    )
    parser.add_argument(
        "--descend",
        action="store_true",
        help="evaluate the largest scale first, and stop at the first one within the tolerance",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.json",
        help="the original's losses on the same sets, from llamapro evaluate --output of it alone, instead of "
        "evaluating scale 0",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        metavar="NATS",
        help=f"how much worse a known set may be, in nats per token (default: {DEFAULT_TOLERANCE})",
    )
    add_evaluation_options(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the new domain against each known set")
    return parser


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0 <= scale <= 2 for scale in scales):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of scales from 0 to 2, e.g. 0,0.5,1")
    return scales
