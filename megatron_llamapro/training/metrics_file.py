"""A run's metrics file: `metrics.jsonl`, one JSON object per line. It survives kills, full disks and other runs.

A figure that is not finite is null, because JSON has no NaN. A last line cut off by a kill is ignored. A file that
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
from megatron_llamapro.config.files import json_text, write_atomically


class JsonlWriter:
    """Appends records. A run that resumes at step n drops the records that an earlier start wrote beyond n."""

    def __init__(self, path: Path, *, resumed_at: int, run_id: str = "") -> None:
        """`run_id` distinguishes the run's own records from those of another run.

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
            print(f"{path} held the records of an earlier run: moved to {move_aside(path)}", flush=True)
            lines = []
        write_atomically(path, b"".join(line.rstrip() + b"\n" for line in lines if _iteration(line) <= resumed_at))

    def write(self, record: Mapping[str, object]) -> None:
        """Append a record. If the disk is full, keep the record for later: training does not stop for it."""
        if record["kind"] == "run":
            record = {**record, "run_id": self._run_id}
        self._pending.append(json_text(record).encode() + b"\n")
        try:
            _append(self.path, b"".join(self._pending))
        except OSError as error:
            if not self._failed:
                warn(f"{self.path} cannot be written: {error.strerror}: the run continues, and retries at every record")
            self._failed = True
            return
        if self._failed:
            warn(f"{self.path} can be written again; no record is missing")
        self._failed = False
        self._pending.clear()

    def close(self) -> None:
        """Warn of records that could not be written by the end."""
        if self._pending:
            warn(f"{self.path} could not be written: records missing at its end: {len(self._pending)}")


def read_records(path: Path) -> list[dict]:
    """Return the records of a file. `figure` reads their figures. A last line cut off by a kill is ignored.

    Raises:
        DataError: the file does not exist, or a line is not a record.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the metrics.jsonl of a run")
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
    """Return one of a record's figures; NaN if it was not finite.

    Raises:
        KeyError: the record has no figure of that name.
    """
    return math.nan if record[name] is None else record[name]


def move_aside(path: Path) -> Path:
    """Rename a file or folder that is in the way, and return its new path: metrics.jsonl becomes metrics.1.jsonl, or
    the next free number."""
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
    """Return whether the newest start in the lines is one of this run. Earlier versions wrote no run ID."""
    starts = [record for line in lines if (record := _parsed(line)) and record["kind"] == "run"]
    return bool(starts) and starts[-1].get("run_id", run_id) == run_id


def _iteration(line: bytes) -> float:
    """Return a record's step. A line cut off by a kill counts as beyond every step."""
    step = (_parsed(line) or {}).get("iteration")
    return step if isinstance(step, int) else math.inf


def _append(path: Path, data: bytes) -> None:
    """Append all of it or nothing: on an error, truncate the file to its size before."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


def warn(text: str) -> None:
    """Print a warning on a line of its own. The run continues."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
