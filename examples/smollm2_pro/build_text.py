"""Collect text that anyone can get: English and Python, known to the model, and new domains: C++, bytecode, German.

python examples/smollm2_pro/build_text.py --output_dir DIR --domains english,python,cpp
                                                              writes DIR/{english,python,cpp}.{train,held_out}.jsonl

| domain | what it is |
|---|---|
| english | Python's language reference |
| python | Python's standard library |
| cpp | the headers of torch |
| bytecode | the standard library, disassembled: nothing like it is in a usual corpus |
| german | the German Debian Administrator's Handbook (Debian's package debian-handbook) |

A hash of its name decides whether a document is held out, so the split is the same everywhere.
"""

from __future__ import annotations

import dis
import hashlib
import io
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.files import write_atomically

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/de-DE")

MAX_DOMAIN_BYTES = 12_000_000

Document = tuple[str, str]
"""Name and text."""


def english() -> Iterator[Document]:
    """Yield the topics of the language reference."""
    yield from sorted(topics.items())


def python() -> Iterator[Document]:
    """Yield the modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "test", "tests", "pydoc_data", "encodings"} & set(path.parts):
            yield from document(path, library)


def cpp() -> Iterator[Document]:
    """Yield the headers of torch."""
    import torch

    headers = Path(torch.__file__).parent / "include"
    for path in sorted(headers.rglob("*.h")):
        yield from document(path, headers)


def bytecode() -> Iterator[Document]:
    """Yield the bytecode of the modules of the standard library, as `python -m dis` lists it, but without addresses."""
    for name, source in python():
        listing = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module may have an invalid escape
            dis.dis(compile(source, name, "exec", dont_inherit=True), file=listing)
        yield name, re.sub(" at 0x[0-9a-f]+", "", listing.getvalue())


def german() -> Iterator[Document]:
    """Yield the pages of the handbook."""
    if not HANDBOOK.is_dir():
        raise ConfigError(f"{HANDBOOK} does not exist: install it (apt install debian-handbook)")
    for path in sorted(HANDBOOK.glob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        yield path.name, page.text()


class Page(HTMLParser):
    """The text of an HTML page: a line per block element."""

    _BLOCKS = frozenset({"p", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "tr", "div", "title"})
    _IGNORED = frozenset({"script", "style", "head"})

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._ignored = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._ignored += tag in self._IGNORED
        if tag in self._BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._ignored -= tag in self._IGNORED

    def handle_data(self, data: str) -> None:
        if not self._ignored:
            self._parts.append(data)

    def text(self) -> str:
        """Return the lines that are not empty."""
        lines = (" ".join(line.split()) for line in "".join(self._parts).splitlines())
        return "\n".join(line for line in lines if line)


def document(path: Path, root: Path) -> Iterator[Document]:
    """Yield one file if it is text."""
    try:
        yield str(path.relative_to(root)), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return


# Source of each domain's documents, and the percentage held out. It is high for English, of which there is little.
DOMAINS = {
    "english": (english, 50),
    "python": (python, 10),
    "cpp": (cpp, 10),
    "bytecode": (bytecode, 10),
    "german": (german, 20),
}
DEMO = "english,python,cpp"


def is_held_out(name: str, percent: int) -> bool:
    """Return whether a document is held out."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < percent


def by_hash(documents: Iterator[Document]) -> list[Document]:
    """Sort by a hash of the names, so that the first megabytes are a fair sample."""
    return sorted(documents, key=lambda item: hashlib.sha256(b"order " + item[0].encode()).digest())


def main() -> int:
    """Write the files and print their numbers of documents."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--domains", default=DEMO, metavar="LIST", help=f"some of {','.join(DOMAINS)} (default: {DEMO})"
    )
    args = parser.parse_args()
    domains = args.domains.split(",")
    for domain in domains:
        if domain not in DOMAINS:
            raise ConfigError(f"--domains: '{domain}' is unknown: use some of {','.join(DOMAINS)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        documents, percent = DOMAINS[domain]
        parts: dict[str, list[str]] = {"train": [], "held_out": []}
        size = 0
        for name, text in by_hash(documents()):
            if text.strip() and size < MAX_DOMAIN_BYTES:
                parts["held_out" if is_held_out(name, percent) else "train"].append(
                    json.dumps({"name": name, "text": text})
                )
                size += len(text)
        for part, lines in parts.items():
            write_atomically(args.output_dir / f"{domain}.{part}.jsonl", "".join(line + "\n" for line in lines))
        print(f"{domain}: {len(parts['train'])} documents to train on, {len(parts['held_out'])} held out")
    return 0


if __name__ == "__main__":
    run_command(main)
