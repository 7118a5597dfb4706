"""The command line: `llamapro COMMAND …`. `python -m megatron_llamapro COMMAND …` is the same."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple, NoReturn

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.version import VERSION


class Command(NamedTuple):
    """A command's module and description."""

    module: str
    """Module within this package. Its `main` takes the arguments after the command's name and returns the exit code."""
    line: str
    """Description for the list of all commands."""


# In the order in which a user needs them.
COMMANDS = {
    "convert": Command("commands.convert", "convert Hugging Face ↔ Megatron, adding blocks if asked"),
    "expand": Command("commands.expand", "add blocks to a Hugging Face checkpoint"),
    "verify": Command("commands.verify", "prove that an expanded model is a correct expansion, trained or not"),
    "inspect": Command(
        "commands.inspect", "describe a checkpoint: family, layers, added blocks, trainable part, sizes"
    ),
    "average": Command("commands.average", "write the mean of several checkpoints of a run"),
    "extract": Command("commands.extract", "write the added blocks of a run as a pack"),
    "compose": Command("commands.compose", "put packs of added blocks into the model that they were made for"),
    "train-tokenizer": Command("commands.train_tokenizer", "train a sentencepiece tokenizer on text"),
    "generate-text": Command("commands.generate_text", "sample documents from a model, to replay them"),
    "preprocess": Command(
        "commands.preprocess", "convert jsonl documents or conversations to token files (.bin, .idx)"
    ),
    "plan-parallelism": Command(
        "commands.plan_parallelism", "find the fastest layout: tensor-parallel ranks, pipeline stages, replicas"
    ),
    "plan-pipeline": Command("commands.plan_pipeline", "find the fastest split of the layers over pipeline stages"),
    "dry-run": Command("commands.dry_run", "show what each rank of a job would hold, execute and send, without a GPU"),
    "train": Command("pretrain", "train in one process; for several: torchrun -m megatron_llamapro.pretrain"),
    "launch": Command("commands.launch", "print or submit the SLURM job that trains a run to its end"),
    "evaluate": Command("commands.evaluate", "evaluate checkpoints on held-out sets, side by side"),
    "sweep": Command("commands.sweep", "evaluate a checkpoint along its dial, and choose a scale"),
    "rank-blocks": Command("commands.rank_blocks", "score every block on held-out sets, and choose which to copy"),
    "plot": Command("commands.plot", "plot the metrics of runs: losses, gradient norm, learning rate, speed"),
}

_WIDTH = max(map(len, COMMANDS))
DESCRIPTION = """LLaMA Pro on megatron.core: add blocks to a LLaMA, train only those, convert back.

llamapro convert hf-to-megatron --source llama-2-7b-hf --target llama-2-7b-pro --num_added_blocks 8
llamapro COMMAND --help      explains a command"""
LIST = "\n".join(["commands:", *(f"  {name:{_WIDTH}}  {command.line}" for name, command in COMMANDS.items())])


def main(*before: str) -> NoReturn:
    """Run the command line as a program. `before` are words to put before the typed ones."""
    run_command(partial(run, [*before, *sys.argv[1:]]))


def run(arguments: Sequence[str]) -> int:
    """Run the command that the first word names. Only its module is imported, so that others cost no time."""
    parser = CommandParser(prog="llamapro", usage="llamapro COMMAND [option …]", description=DESCRIPTION, epilog=LIST)
    parser.add_argument("--version", action="version", version=f"megatron-llamapro {VERSION}")
    parser.add_argument("command", type=_command, metavar="COMMAND", help=argparse.SUPPRESS)
    num_ours = next((count for count, word in enumerate(arguments, 1) if not word.startswith("-")), len(arguments))
    args = parser.parse_args(arguments[:num_ours] or ["--help"])
    return import_module(f"megatron_llamapro.{args.command.module}").main(arguments[num_ours:])


def _command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    begins = [each for each in COMMANDS if each.startswith(name) or name.startswith(each)]
    near = begins or difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise argparse.ArgumentTypeError(f"{name!r} does not exist: {hint}")


if __name__ == "__main__":
    main()
