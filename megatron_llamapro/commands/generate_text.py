"""Sample documents from a Hugging Face checkpoint, to replay them beside new data: {"text": "…"}, one a line.

llamapro generate-text --model HF_DIR --output FILE.jsonl --num_documents N

A document starts with the token that documents start with in the model's training, and ends at the one that ends them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_llamapro.config.command import CommandParser, end_when_terminated
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.values import spelled_as
from megatron_llamapro.data.generate import GeneratedText, TextRequest, generate_text
from megatron_llamapro.data.samplers import BATCH_SIZES, SamplerBackend
from megatron_llamapro.data.text_draft import Written
from megatron_llamapro.families.hf_config import WEIGHT_DTYPES

_DEFAULT = TextRequest(Path())
_BATCHES = ", ".join(f"{size} with {backend.value}" for backend, size in BATCH_SIZES.items())

# Options of a request: name, type, metavar, help.
_OPTIONS = (
    ("num_documents", int, "N", "documents to sample"),
    ("num_tokens", int, "N", "instead: sample until the documents have this many tokens"),
    (
        "max_document_tokens",
        int,
        "N",
        f"longest document; longer ones are cut (default: {_DEFAULT.max_document_tokens})",
    ),
    ("batch_size", int, "N", f"documents that are sampled together (default: {_BATCHES})"),
    ("temperature", float, "T", "temperature (default: 1, the model's own distribution)"),
    ("top_p", float, "P", "sample from the most likely tokens that together have this probability (default: 1, all)"),
    ("seed", int, "N", "seed (default: 0)"),
    (
        "eod_token",
        str,
        "TOKEN",
        "token that starts and ends documents (default: the tokenizer's begin of sequence, else its end, starts them; "
        "its end of sequence ends them)",
    ),
    ("prompts", Path, "FILE.jsonl", "texts whose first tokens start the documents, in turn"),
    ("prompt_tokens", int, "N", f"tokens of a prompt to use (default: {_DEFAULT.prompt_tokens}); shorter are left out"),
)


def main(arguments: Sequence[str]) -> int:
    """Read the options, sample, print a summary."""
    args = _parser().parse_args(arguments)
    end_when_terminated()
    chosen = {name: getattr(args, name) for name, *_ in _OPTIONS if getattr(args, name) is not None}
    backend = None if args.backend == "auto" else SamplerBackend(args.backend)
    request = TextRequest(args.model, **chosen, dtype=args.dtype, backend=backend)
    request.check(args.output, overwrite=args.overwrite)
    _check_model(request)

    started = time.monotonic()
    with _Bar(request) as bar:
        writing = {"overwrite": args.overwrite, "resume": args.resume}
        try:
            done = generate_text(request, args.output, **writing, on_start=bar.start, progress=bar.progress)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)("to continue, run the same command with --resume") from None
    print(_summary(args.output, done, seconds=time.monotonic() - started))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="llamapro generate-text", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="checkpoint with its tokenizer")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    for name, kind, metavar, text in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--dtype",
        type=partial(spelled_as, WEIGHT_DTYPES),
        choices=WEIGHT_DTYPES,
        help="type to compute in (default: the one that the weights are stored in)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *(backend.value for backend in SamplerBackend)),
        default="auto",
        help="library that runs the model (default: vllm if it is installed and there is a GPU, else transformers)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output, once it is complete")
    parser.add_argument("--resume", action="store_true", help="continue an earlier, interrupted run to this output")
    return parser


def _check_model(request: TextRequest) -> None:
    """Raise `CheckpointError` if this is no complete checkpoint of a known family, and `ConfigError` if documents are
    longer than its positions."""
    from megatron_llamapro.checkpoint.formats.hf_reader import open_hf

    positions = open_hf(request.model).shape.max_position_embeddings
    if request.max_document_tokens >= positions:
        raise ConfigError(
            f"--max_document_tokens is {request.max_document_tokens}: it must be below the {positions} positions of "
            f"{request.model}, because a document starts with one more token"
        )


class _Bar:
    """A bar of the documents or tokens that were requested, with the speed in tokens. Shown on a terminal only."""

    def __init__(self, request: TextRequest) -> None:
        self._counts_tokens = request.num_tokens is not None
        self._bar = tqdm(
            desc="sampling",
            total=request.num_tokens or request.num_documents,
            unit=" tokens" if self._counts_tokens else " documents",
            disable=None,
            leave=False,
        )
        self._num_documents = self._num_tokens = 0
        self._started = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def start(self, resumed: Written) -> None:
        self._num_documents = resumed.num_documents
        self._bar.initial = self._bar.n = resumed.num_tokens if self._counts_tokens else resumed.num_documents
        self._started = time.monotonic()

    def progress(self, num_documents: int, num_tokens: int) -> None:
        self._num_documents += num_documents
        self._num_tokens += num_tokens
        speed = self._num_tokens / (time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{self._num_documents:,} documents, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(num_tokens if self._counts_tokens else num_documents)


def _summary(output: Path, done: GeneratedText, *, seconds: float) -> str:
    written, resumed = done.written, done.resumed
    speed = (written.num_tokens - resumed.num_tokens) / seconds
    earlier = f", {resumed.num_documents:,} of them by an earlier run" if resumed.num_documents else ""
    lines = [
        f"{output}: {written.num_documents:,} documents, {written.num_tokens:,} tokens{earlier}, in {seconds:.1f} s "
        f"({speed:,.0f} tokens/s)",
        f"they start with {done.start!r} and end with {done.end!r}",
    ]
    if written.num_cut:
        lines.append(f"{written.num_cut:,} were cut at the longest length")
    return "\n".join(lines)
