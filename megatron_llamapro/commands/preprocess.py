"""Convert jsonl text (one document per line) into Megatron's token files, .bin and .idx.

llamapro preprocess --input FILE.jsonl... --tokenizer DIR_OR_FILE --output_prefix PREFIX [--num_workers N]

With --chat, each line is a conversation: {"messages": [{"role": "user", "content": "…"}, …]}.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, end_when_terminated
from megatron_llamapro.data.text_files import check_request


def main(arguments: Sequence[str]) -> int:
    """Read the options, tokenize, print a summary."""
    parser = CommandParser(prog="llamapro preprocess", description=__doc__)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE.jsonl", help="text files, in order"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR_OR_FILE", help="tokenizer.json, .model, or their folder"
    )
    parser.add_argument("--output_prefix", type=Path, required=True, metavar="PREFIX", help="path without .bin or .idx")
    parser.add_argument("--json_key", help="field of a line to read (default: text, or messages with --chat)")
    parser.add_argument("--eod_token", help="token that ends a document (default: the tokenizer's end of sequence)")
    parser.add_argument("--chat", action="store_true", help="lines are conversations; mark the assistant's tokens")
    parser.add_argument(
        "--chat_template", type=Path, metavar="FILE.jinja", help="chat template (default: the tokenizer's)"
    )
    parser.add_argument("--num_workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing token files")
    args = parser.parse_args(arguments)
    end_when_terminated()
    settings = {name: getattr(args, name) for name in ("tokenizer", "num_workers", "overwrite")}
    check_request(args.input, args.output_prefix, **settings)  # before the imports, which take seconds

    from tqdm import tqdm

    from megatron_llamapro.data.preprocess import preprocess

    started, total = time.monotonic(), sum(path.stat().st_size for path in args.input)
    with tqdm(desc="tokenizing", total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        done = preprocess(
            args.input,
            args.output_prefix,
            **settings,
            json_key=args.json_key,
            eod_token=args.eod_token,
            chat=args.chat,
            chat_template=args.chat_template,
            progress=bar.update,
        )
    seconds = time.monotonic() - started
    print(f"{args.output_prefix}: {done.summary} in {seconds:.1f} s ({done.info.num_tokens / seconds:,.0f} tokens/s)")
    return 0
