"""A run's metrics records, and their lines on the console. `metrics_file.py` and `trackers.py` write them elsewhere.

`records.py` opens all writers; a writer has one method, `write`. A record is a flat dict with a `kind`: `run` (once per
start), `train` (a logged step), `eval` (a held-out set), `block` (an added block's diagnostics), `save` (a complete
checkpoint), `skip` (a step without an update).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_llamapro.config.schema import LoggingConfig
from megatron_llamapro.config.values import decimal_size

Record = Mapping[str, object]

# Figures of a `block` record, with their axis labels in plots.
BLOCK_FIGURES = {
    "contribution": "contribution of a block to the stream",
    "grad_norm": "gradient norm of a block",
    "distance": "distance from the copied block",
    "output_norm": "norm of output projections",
}


class MetricsWriter(Protocol):
    """An object that takes records."""

    def write(self, record: Record) -> None: ...


class ConsoleWriter:
    """Prints one aligned line per record."""

    def __init__(self, *, train_iters: int) -> None:
        self.width = len(str(train_iters))
        self.train_iters = train_iters

    def write(self, record: Record) -> None:
        if record["kind"] == "train":
            _say(self._train_line(record))
        elif record["kind"] == "eval":
            step = f"step {record['iteration']:>{self.width}}/{self.train_iters}"
            _say(f"{step} │ held-out {record['name']}: loss {record['loss']:.4f}")
        elif record["kind"] == "block":
            _say(self._block_line(record))
        elif record["kind"] == "save":
            _say(self._save_line(record))
        elif record["kind"] == "skip":
            _say(self._skip_line(record))

    def _skip_line(self, record: Record) -> str:
        line = f"step {record['iteration']:>{self.width}}/{self.train_iters} │ "
        if record["outcome"] == "left out":
            return line + f"left out by training.skip_iterations; skipped so far: {record['skipped_steps']}"
        reason = f"loss {record['loss']:.4f}, grad norm {record['grad_norm']:.4f}"
        if record["tokens"] == 0:
            reason = "none of its tokens has a loss"
        return line + (
            f"no update: {reason}; in a row: {record['skipped_in_a_row']}, skipped so far: {record['skipped_steps']}"
        )

    def _save_line(self, record: Record) -> str:
        line = f"saved step {record['iteration']}: {record['stall_seconds']:.1f} s stall, "
        if record["asynchronous"]:
            line += f"{record['seconds']:.1f} s in all, "
        return line + decimal_size(record["num_bytes"])

    def _block_line(self, record: Record) -> str:
        return (
            f"step {record['iteration']:>{self.width}}/{self.train_iters} │ block {record['layer']:>3} │ "
            f"adds {record['contribution']:.2e} of the stream │ grad norm {record['grad_norm']:.2e} │ "
            f"distance {record['distance']:.2e} │ output norm {record['output_norm']:.2e}"
        )

    def _train_line(self, record: Record) -> str:
        penalty = f"penalty {record['penalty']:.2e} │ " if "penalty" in record else ""
        return (
            f"step {record['iteration']:>{self.width}}/{self.train_iters} │ loss {record['loss']:7.4f} │ {penalty}"
            f"grad norm {record['grad_norm']:8.4f} │ lr {record['learning_rate']:.2e} │ "
            f"{record['tokens_per_second']:>9,.0f} tokens/s │ {record['tflops_per_second']:7.3f} TFLOP/s a rank │ "
            f"{record['memory_gib']:6.2f} GiB"
        )


def _say(line: str) -> None:
    """Print a line. If it cannot be printed because of a full disk, training continues."""
    try:
        print(line, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def metrics_path(config: LoggingConfig, *, save: str | None) -> Path:
    """Return the path of the JSONL file."""
    return Path(config.metrics_file) if config.metrics_file else Path(save or ".") / "metrics.jsonl"
