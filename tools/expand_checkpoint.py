"""Add blocks to a Hugging Face LLaMA; the result computes what the original does until it is trained.

python tools/expand_checkpoint.py --source HF_DIR --target HF_DIR (--num_added_blocks N | --positions 4,9,14)
"""

from __future__ import annotations

from pathlib import Path

from megatron_llamapro.checkpoint.report import add_shard_option, add_writing_options, conversion_options, summary
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
    add_shard_option(parser)
    add_writing_options(parser)
    args = parser.parse_args()
    expansion = read_expansion_options(parser, args)
    if expansion is None:
        parser.error("say which blocks to add: --num_added_blocks N, or --positions 4,9,14")

    from megatron_llamapro.checkpoint.convert import expand_hf

    with conversion_options("expanding", args) as options:
        settings = {"dtype": args.dtype, "max_shard_bytes": args.max_shard_bytes, "options": options}
        done = expand_hf(args.source, args.target, **settings, **expansion.arguments())
    print(summary(done))
    return 0


if __name__ == "__main__":
    run_command(main)
