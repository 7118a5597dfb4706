"""Convert a LLaMA between Hugging Face (safetensors) and Megatron (torch_dist or legacy), adding blocks on the way.

python tools/convert_checkpoint.py hf-to-megatron --source HF_DIR --target DIR [--num_added_blocks N | --positions 4,9]
python tools/convert_checkpoint.py megatron-to-hf --source DIR --target HF_DIR
python tools/convert_checkpoint.py megatron-to-megatron --source DIR --target DIR --format legacy
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
import megatron_llamapro.commands.checkpoint_options as shared
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.config.command import CommandParser, run_command

# What each command does, what it reads, what it writes.
COMMANDS = {
    "hf-to-megatron": ("Hugging Face → Megatron; without added blocks: as it is", "HF_DIR", "DIR"),
    "megatron-to-hf": ("Megatron → Hugging Face", "DIR", "HF_DIR"),
    "megatron-to-megatron": ("Megatron → another format, division of ranks, or round of added blocks", "DIR", "DIR"),
}
SOURCES = {"HF_DIR": "Hugging Face checkpoint", "DIR": "checkpoint, or a run's folder of checkpoints: its newest"}


def main() -> int:
    """Read the options, convert, say what was done."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    parsers = {name: commands.add_parser(name, help=COMMANDS[name][0]) for name in COMMANDS}
    for name, (_, source, target) in COMMANDS.items():
        parsers[name].add_argument("--source", type=Path, required=True, metavar=source, help=SOURCES[source])
        parsers[name].add_argument("--target", type=Path, required=True, metavar=target, help="folder to write")
        for add in _options_of(name):
            add(parsers[name])
    args = parser.parse_args()
    settings = _read(parsers[args.command], args)

    from megatron_llamapro.checkpoint import convert

    with shared.writing_options("converting", args) as options:
        function = getattr(convert, args.command.replace("-", "_"))
        done = function(args.source, args.target, options=options, **settings)
    print(summary(done))
    return 0


def _options_of(command: str):
    change = (shared.add_change_options, shared.add_format_options)
    return [*((shared.add_shard_option,) if command.endswith("hf") else change), shared.add_writing_options]


def _read(parser: CommandParser, args) -> dict:
    if args.command == "megatron-to-hf":
        return {"max_shard_bytes": args.max_shard_bytes}
    return {**shared.read_change_options(parser, args), "kind": shared.read_format_options(parser, args)}


if __name__ == "__main__":
    run_command(main)
