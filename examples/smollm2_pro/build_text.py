"""Collect text that every installation has: English and Python, known to the model, and C++, the new domain.

python examples/smollm2_pro/build_text.py --output_dir DIR      writes DIR/{english,python,cpp}.{train,held_out}.jsonl

English is Python's own documentation, Python its standard library, C++ the headers of torch. A hash of its name
decides whether a document is held out, so the split is the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from megatron_llamapro.config.command import CommandParser, run_command

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


def document(path: Path, root: Path) -> Iterator[Document]:
    """Yield one file if it is text."""
    try:
        yield str(path.relative_to(root)), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return


# Source of each domain's documents, and the percentage held out. It is high for English, of which there is little.
DOMAINS = {"english": (english, 50), "python": (python, 10), "cpp": (cpp, 10)}


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
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for domain, (documents, percent) in DOMAINS.items():
        parts: dict[str, list[str]] = {"train": [], "held_out": []}
        size = 0
        for name, text in by_hash(documents()):
            if text.strip() and size < MAX_DOMAIN_BYTES:
                parts["held_out" if is_held_out(name, percent) else "train"].append(
                    json.dumps({"name": name, "text": text})
                )
                size += len(text)
        for part, lines in parts.items():
            (args.output_dir / f"{domain}.{part}.jsonl").write_text("".join(line + "\n" for line in lines))
        print(f"{domain}: {len(parts['train'])} documents to train on, {len(parts['held_out'])} held out")
    return 0


if __name__ == "__main__":
    run_command(main)
