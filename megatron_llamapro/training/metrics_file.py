"""A run's record on disk: `metrics.jsonl`, one JSON object a line. It outlives a kill, a full disk and other runs.

A figure that is not finite is null, since JSON has no NaN. A last line that a kill has cut is no record. A record that
another run left under the same name is moved aside, never overwritten.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_llamapro.config.errors import DataError


class JsonlWriter:
    """Appends records. A run that continues at step n drops what an earlier start of it wrote beyond n."""

    def __init__(self, path: Path, *, resumed_at: int, run_id: str = "") -> None:
        """`run_id` tells the run's own records from those of another run.

        Raises:
            OSError: the file cannot be written.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run_id = run_id
        self._pending: list[bytes] = []
        self._failed = False
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not (resumed_at and _belongs(lines, run_id)):
            print(f"{path} had the records of an earlier run: they are in {move_aside(path)} now", flush=True)
            lines = []
        _replace(path, b"".join(line.rstrip() + b"\n" for line in lines if _iteration(line) <= resumed_at))

    def write(self, record: Mapping[str, object]) -> None:
        """Append a record. Where the disk is full it is kept for later: a line less is no reason to stop training."""
        if record["kind"] == "run":
            record = {**record, "run_id": self._run_id}
        self._pending.append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        try:
            _append(self.path, b"".join(self._pending))
        except OSError as error:
            if not self._failed:
                warn(f"{self.path} cannot be written: {error.strerror}: the run goes on, and tries again every time")
            self._failed = True
            return
        if self._failed:
            warn(f"{self.path} is written again; no record is missing")
        self._failed = False
        self._pending.clear()

    def close(self) -> None:
        """Say what could not be written until the end."""
        if self._pending:
            warn(f"{self.path} lacks the last {len(self._pending)} records: it could not be written")


def read_records(path: Path) -> list[dict]:
    """The records of a file. `figure` reads their figures.

    Raises:
        DataError: the file is missing, or a line is no record; but for the last one, if a kill has cut it.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there: give the metrics.jsonl of a run")
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is not None:
            records.append(record)
        elif number == 1 or number < len(lines) or line.endswith(b"\n"):
            raise DataError(
                f"{path}, line {number}: not a metrics record: {line[:40].decode(errors='replace').strip()}"
            )
    return records


def figure(record: Mapping, name: str) -> float:
    """One of a record's figures; not a number (NaN) where it was not finite.

    Raises:
        KeyError: the record has none of that name.
    """
    return math.nan if record[name] is None else record[name]


def move_aside(path: Path) -> Path:
    """Give a file or folder that is in the way another name: metrics.jsonl becomes metrics.1.jsonl, or the next number
    that is free."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    return path.rename(free)


def _parsed(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:  # also text that is not UTF-8
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def _belongs(lines: list[bytes], run_id: str) -> bool:
    """Whether the newest start that the lines tell of is one of this run. Versions before this one named no run."""
    starts = [record for line in lines if (record := _parsed(line)) and record["kind"] == "run"]
    return bool(starts) and starts[-1].get("run_id", run_id) == run_id


def _iteration(line: bytes) -> float:
    """Step of a record; a line cut short by a kill counts as beyond every step."""
    step = (_parsed(line) or {}).get("iteration")
    return step if isinstance(step, int) else math.inf


def _finite(value: object) -> object:
    """A record, with null for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_bytes(content)
    draft.replace(path)


def _append(path: Path, data: bytes) -> None:
    """All of it or nothing: what a full disk took a part of is taken back."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


def warn(text: str) -> None:
    """What does not end the run, on one line of its own."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
