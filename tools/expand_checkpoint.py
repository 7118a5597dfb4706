"""Add blocks to a Hugging Face LLaMA; the result computes what the original does until it is trained.

python tools/expand_checkpoint.py --source HF_DIR --target HF_DIR (--num_added_blocks N | --positions 4,9,14)
"""

from __future__ import annotations

from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.expansion.options import add_expansion_options, read_expansion_options
from megatron_llamapro.model.families import WEIGHT_DTYPES


def main() -> int:
    """Read the options, expand, say what was done."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="HF_DIR", help="Hugging Face checkpoint")
    parser.add_argument("--target", type=Path, required=True, metavar="HF_DIR", help="folder to write")
    add_expansion_options(parser)
    parser.add_argument("--dtype", choices=WEIGHT_DTYPES, help="cast the weights (default: keep the source's type)")
    parser.add_argument("--overwrite", action="store_true", help="replace the target, once its successor is ready")
    args = parser.parse_args()
    expand = read_expansion_options(parser, args)
    if expand is None:
        parser.error("say which blocks to add: --num_added_blocks N, or --positions 4,9,14")

    from megatron_llamapro.checkpoint.convert import expand_hf
    from megatron_llamapro.checkpoint.report import byte_bar, summary

    with byte_bar("expanding") as bar:
        done = expand_hf(
            args.source,
            args.target,
            expand=expand,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=bar.progress,
            on_total=bar.on_total,
        )
    print(summary(done))
    return 0


if __name__ == "__main__":
    run_command(main)
