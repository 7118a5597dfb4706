"""Reads the files that the real wandb package writes for its server in offline mode: records in LevelDB's log
format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER, _BLOCK = 7, 32768


@dataclass(frozen=True)
class OfflineRun:
    """One start of a run."""

    run_id: str
    name: str
    project: str
    config: dict
    history: dict[int, dict]
    """Figures by step."""
    exit_code: int | None


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Return the starts kept in `folder`/wandb, in order."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    runs, history, exit_code = [], {}, None
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            runs.append(record.run)
        elif kind == "history":
            figures = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            history.setdefault(figures["_step"], {}).update(figures)
        elif kind == "exit":
            exit_code = record.exit.exit_code
    run = runs[0]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    return OfflineRun(run.run_id, run.display_name, run.project, config, history, exit_code)


def _records(data: bytes) -> Iterator:
    from wandb.proto import wandb_internal_pb2

    at, whole = _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        whole += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
