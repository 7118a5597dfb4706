"""Train a sentencepiece tokenizer (BPE with byte fallback, like LLaMA's) and write DIR/tokenizer.model.

llamapro train-tokenizer --input FILE... --vocab_size N --output_dir DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, end_when_terminated


def main(arguments: Sequence[str]) -> int:
    """Read the options, train, print the model's path."""
    parser = CommandParser(prog="llamapro train-tokenizer", description=__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="text or .jsonl files")
    parser.add_argument(
        "--vocab_size", type=int, required=True, metavar="N", help="size of the vocabulary, at least 260"
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--json_key", default="text", help="field of a .jsonl line that holds the text (default: text)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer.model")
    args = parser.parse_args(arguments)
    end_when_terminated()

    from megatron_llamapro.data.train_tokenizer import train_tokenizer

    path = train_tokenizer(
        args.input, args.output_dir, vocab_size=args.vocab_size, json_key=args.json_key, overwrite=args.overwrite
    )
    print(f"{path}: {args.vocab_size} tokens")
    return 0
