"""A text file that is written in batches: complete at its place, or a draft beside it that can be continued."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_llamapro.config.drafts import draft_of, folder_made, locked, sync
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.files import write_atomically

_TEXT, _BATCHES = "text.jsonl", "batches.jsonl"


@dataclass(frozen=True)
class Written:
    """Amounts of text."""

    num_documents: int = 0
    num_tokens: int = 0
    """Including the tokens that end documents."""
    num_cut: int = 0
    """Documents without an end: they reached the longest length."""
    num_bytes: int = 0
    """In the file."""

    def __add__(self, other: Written) -> Written:
        return Written(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True)
class WrittenDocument:
    """A document, and its number of tokens."""

    text: str
    num_tokens: int
    is_cut: bool


class TextDraft:
    """The batches that are complete. Use `text_draft` to make one.

    The draft is a folder with the text and a list of batches, one a line, after a line with the settings. A batch
    counts if its line and its text are complete.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *, resume: bool) -> None:
        self._text, self._batches = folder / _TEXT, folder / _BATCHES
        lines = self._batches.read_bytes().split(b"\n")[:-1] if resume and self._batches.is_file() else []
        earlier = _record(lines[0]) if lines else None
        if earlier is None:  # none, or damaged by a crash of the machine
            lines = []
        else:
            _check_settings(folder, earlier, settings)
        with self._text.open("ab") as file:
            batches = _complete(lines[1:], num_bytes=file.tell())
            self.num_batches, self.written = len(batches), sum(batches, Written())
            file.truncate(self.written.num_bytes)
        head = [json.dumps(settings), *(json.dumps(asdict(batch)) for batch in batches)]
        write_atomically(self._batches, "".join(f"{line}\n" for line in head))

    def add(self, documents: Iterable[WrittenDocument]) -> None:
        """Store a batch."""
        documents = list(documents)
        data = "".join(json.dumps({"text": each.text}, ensure_ascii=False) + "\n" for each in documents).encode()
        num_tokens, num_cut = (sum(getattr(each, name) for each in documents) for name in ("num_tokens", "is_cut"))
        batch = Written(len(documents), num_tokens, num_cut, len(data))
        for path, more in ((self._text, data), (self._batches, f"{json.dumps(asdict(batch))}\n".encode())):
            with path.open("ab") as file:
                file.write(more)
            sync(path)
        self.num_batches += 1
        self.written += batch

    def publish(self, output: Path) -> None:
        """Move the text to `output`."""
        self._text.replace(output)
        sync(output.parent)


@contextlib.contextmanager
def text_draft(output: Path, settings: Mapping[str, object], *, resume: bool) -> Iterator[TextDraft]:
    """Yield the draft of a text: with `resume`, the one that an earlier run left, else an empty one.

    The draft is removed at the end, except if the block fails and a batch is complete.

    Raises:
        CheckpointError: another process is writing this output.
        DataError: the earlier run had other settings.
    """
    folder, draft = draft_of(output), None
    with folder_made(output.parent), locked(folder, output):
        is_published = False
        try:
            draft = TextDraft(folder, settings, resume=resume)
            yield draft
            is_published = True
        finally:
            if is_published or (draft is not None and not draft.num_batches):
                shutil.rmtree(folder, ignore_errors=True)


def _record(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _check_settings(folder: Path, earlier: Mapping[str, object], settings: Mapping[str, object]) -> None:
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise DataError(
                f"{folder} was started with {name} {earlier.get(name)}, not {value}: give the same options, or leave "
                "out --resume to start again"
            )


def _complete(lines: Iterable[bytes], *, num_bytes: int) -> list[Written]:
    """Return the batches of these lines up to the first that is damaged, or of which the text file has only a part."""
    found: list[Written] = []
    for line in lines:
        try:
            batch = Written(**json.loads(line))
        except (ValueError, TypeError):
            break
        num_bytes -= batch.num_bytes
        if num_bytes < 0:
            break
        found.append(batch)
    return found
