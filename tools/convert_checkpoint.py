"""Convert a LLaMA between Hugging Face (safetensors) and Megatron (torch_dist), adding blocks on the way.

python tools/convert_checkpoint.py hf-to-megatron --source HF_DIR --target DIR [--num_added_blocks N | --positions 4,9]
python tools/convert_checkpoint.py megatron-to-hf --source DIR --target HF_DIR
"""

from __future__ import annotations

from pathlib import Path

from megatron_llamapro.checkpoint.report import add_shard_option, add_writing_options, conversion_options, summary
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.expansion.options import add_expansion_options, read_expansion_options
from megatron_llamapro.model.families import WEIGHT_DTYPES


def main() -> int:
    """Read the options, convert, say what was done."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{hf-to-megatron,megatron-to-hf}")
    forward = commands.add_parser("hf-to-megatron", help="Hugging Face → Megatron; without added blocks: as it is")
    forward.add_argument("--source", type=Path, required=True, metavar="HF_DIR", help="Hugging Face checkpoint")
    forward.add_argument("--target", type=Path, required=True, metavar="DIR", help="folder to write")
    add_expansion_options(forward)
    forward.add_argument("--dtype", choices=WEIGHT_DTYPES, help="cast the weights (default: keep the source's type)")
    backward = commands.add_parser("megatron-to-hf", help="Megatron → Hugging Face")
    backward.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="checkpoint, or a run's folder of checkpoints: newest"
    )
    backward.add_argument("--target", type=Path, required=True, metavar="HF_DIR", help="folder to write")
    add_shard_option(backward)
    for command in (forward, backward):
        add_writing_options(command)
    args = parser.parse_args()
    expansion = read_expansion_options(forward, args) if args.command == "hf-to-megatron" else None

    from megatron_llamapro.checkpoint.convert import hf_to_megatron, megatron_to_hf

    with conversion_options("converting", args) as options:
        if args.command == "megatron-to-hf":
            done = megatron_to_hf(args.source, args.target, max_shard_bytes=args.max_shard_bytes, options=options)
        else:
            added = expansion.arguments() if expansion else {}
            done = hf_to_megatron(args.source, args.target, dtype=args.dtype, options=options, **added)
    print(summary(done))
    return 0


if __name__ == "__main__":
    run_command(main)
