"""Prove that an expanded model is a correct expansion of its original. Exit code 0 if it is, 1 if not.

llamapro verify --original DIR --expanded DIR [--trained nothing]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.commands.options import add_workers_option
from megatron_llamapro.config.command import CommandParser
from megatron_llamapro.expansion.plan import Trained


def main(arguments: Sequence[str]) -> int:
    """Print one line per check."""
    parser = CommandParser(prog="llamapro verify", description=__doc__)
    parser.add_argument(
        "--original", type=Path, required=True, metavar="DIR", help="checkpoint that was expanded, in any format"
    )
    parser.add_argument(
        "--expanded",
        type=Path,
        required=True,
        metavar="DIR",
        help="its expansion, trained or not, in any format; or a run's folder (its newest checkpoint)",
    )
    parser.add_argument("--quick", action="store_true", help="check the structure only, not the two models' logits")
    parser.add_argument(
        "--trained",
        choices=[trained.value for trained in Trained],
        default=Trained.NEW_BLOCKS.value,
        help="which blocks may have been trained. nothing: none, as after the conversion; new_blocks (default): those "
        "that were added to the original; added_blocks: also those that earlier rounds had added to it",
    )
    parser.add_argument(
        "--undialed",
        type=Path,
        metavar="DIR",
        help="of a dialed model: the checkpoint that was dialed (the run, or its export), to prove the dial",
    )
    add_workers_option(parser)
    args = parser.parse_args(arguments)

    from megatron_llamapro.checkpoint.proof.verify import verify
    from megatron_llamapro.checkpoint.report import byte_bar

    all_ok = True
    settings = {name: getattr(args, name) for name in ("quick", "undialed", "num_workers")}
    settings["trained"] = Trained(args.trained)
    with byte_bar("verifying") as bar:
        for check in verify(args.original, args.expanded, progress=bar.progress, **settings):
            bar.write(str(check))
            all_ok &= check.ok
    return 0 if all_ok else 1
