"""The measurements of benchmarks/convert.py as a Markdown table, with the machine that they were made on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import megatron_llamapro
from random_llama import LlamaShape
from venvs import Venv

FLOOR = "**the floor**"
_OWN_PACKAGES = ("torch", "safetensors", "transformers")


@dataclass(frozen=True)
class Run:
    """One run of one step. `failure` is the reason if there are no numbers."""

    seconds: float = 0.0
    peak_anonymous_bytes: int = 0
    written_bytes: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    failure: str | None = None


def describe_machine(folder: Path, *, venv: Venv | None) -> dict[str, str]:
    """Return everything that the numbers depend on: machine, page cache, versions, date."""
    memory_bytes = psutil.virtual_memory().total
    versions = {name: importlib.metadata.version(name) for name in _OWN_PACKAGES}
    versions = {"python": platform.python_version(), "megatron-llamapro": megatron_llamapro.__version__, **versions}
    described = {
        "machine": f"{_processor()}, {psutil.cpu_count()} cores, {memory_bytes / 1e9:.0f} GB, {file_system(folder)}",
        "page cache": "the checkpoints' files are dropped before each run; programs and libraries stay",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    return {**described, "Megatron-Bridge's environment": ", ".join(venv.pins)} if venv else described


def markdown(
    name: str,
    shape: LlamaShape,
    expanded: LlamaShape,
    rows: Mapping[str, Sequence[Run]],
    machine: Mapping[str, str],
) -> str:
    """Return the table: medians, and the fastest and slowest run if there are several."""
    [floor] = [runs for title, runs in rows.items() if FLOOR in title]
    lines = [
        f"### {name}: {shape.num_hidden_layers} → {expanded.num_hidden_layers} blocks, "
        f"{shape.num_bytes / 1e9:.3g} → {expanded.num_bytes / 1e9:.3g} GB of bfloat16, random weights",
        "",
        "| | seconds | GB written | GB/s | × floor | GB that the disk moved | peak anonymous memory, GB |",
        "|---|---|---|---|---|---|---|",
        *(_row(title, runs, floor) for title, runs in rows.items()),
        "",
        "Seconds end when the bytes are on the disk (`sync`). × floor: seconds per byte written, divided by the "
        "floor's in the same round.",
        *(f"- {what}: {value}" for what, value in machine.items()),
    ]
    return "\n".join(lines)


def _row(title: str, runs: Sequence[Run], floor: Sequence[Run]) -> str:
    if runs[-1].failure:
        return f"| {title} | failed: {runs[-1].failure} | | | | | |"
    times = [run.seconds for run in runs]
    seconds = f"{statistics.median(times):.2f}"
    if len(times) > 1:
        seconds += f" ({min(times):.2f}–{max(times):.2f})"
    speed = statistics.median(run.written_bytes / run.seconds for run in runs)
    ratio = statistics.median(_seconds_a_byte(a) / _seconds_a_byte(b) for a, b in zip(runs, floor, strict=True))
    written, peak = runs[-1].written_bytes / 1e9, max(run.peak_anonymous_bytes for run in runs) / 1e9
    moved = statistics.median(run.disk_read_bytes + run.disk_write_bytes for run in runs) / 1e9
    return f"| {title} | {seconds} | {written:.3f} | {speed / 1e9:.3f} | {ratio:.2f} | {moved:.3f} | {peak:.2f} |"


def _seconds_a_byte(run: Run) -> float:
    return run.seconds / run.written_bytes


def _processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system, as `stat` names it."""
    command = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
