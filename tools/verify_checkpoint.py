"""Prove that an expanded model is what it should be; exit code 0 if it is, 1 if not.

python tools/verify_checkpoint.py --original HF_DIR --expanded HF_OR_MEGATRON_DIR
"""

from __future__ import annotations

from pathlib import Path

from megatron_llamapro.checkpoint.options import add_workers_option
from megatron_llamapro.config.command import CommandParser, run_command


def main() -> int:
    """Print one line a check."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--original", type=Path, required=True, metavar="HF_DIR", help="Hugging Face checkpoint that was expanded"
    )
    parser.add_argument(
        "--expanded",
        type=Path,
        required=True,
        metavar="DIR",
        help="its expansion, trained or not: Hugging Face, Megatron, or a run's folder (its newest checkpoint)",
    )
    parser.add_argument("--quick", action="store_true", help="structure alone: do not compute the two models' logits")
    add_workers_option(parser)
    args = parser.parse_args()

    from megatron_llamapro.checkpoint.report import byte_bar
    from megatron_llamapro.checkpoint.verify import verify

    all_ok = True
    with byte_bar("verifying") as bar:
        for check in verify(
            args.original, args.expanded, quick=args.quick, num_workers=args.num_workers, progress=bar.progress
        ):
            bar.write(str(check))
            all_ok &= check.ok
    return 0 if all_ok else 1


if __name__ == "__main__":
    run_command(main)
