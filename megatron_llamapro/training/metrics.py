"""Where a run's figures go: the console, a JSONL file, TensorBoard, Weights & Biases. Each is one method, `write`.

A record is a flat dict with its `kind`: `run` (once a start), `train` (a logged step), `eval` (a held-out set), `block`
(an added block's diagnostics), `save` (a complete checkpoint), `skip` (a step without an update).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_llamapro.checkpoint.report import size_text
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import LoggingConfig

Record = Mapping[str, object]

# Figures of a `block` record, with their axis' name in pictures.
BLOCK_FIGURES = {
    "contribution": "what a block adds, of the stream",
    "grad_norm": "gradient norm of a block",
    "distance": "distance from the copied block",
    "output_norm": "norm of output projections",
}


class MetricsWriter(Protocol):
    """Anything that takes records."""

    def write(self, record: Record) -> None: ...


class ConsoleWriter:
    """One aligned line a step and a held-out set."""

    def __init__(self, *, train_iters: int) -> None:
        self.width = len(str(train_iters))
        self.train_iters = train_iters

    def write(self, record: Record) -> None:
        if record["kind"] == "train":
            print(self._train_line(record), flush=True)
        elif record["kind"] == "eval":
            step = f"step {record['iteration']:>{self.width}}/{self.train_iters}"
            print(f"{step} │ held-out {record['name']}: loss {record['loss']:.4f}", flush=True)
        elif record["kind"] == "block":
            print(self._block_line(record), flush=True)
        elif record["kind"] == "save":
            print(self._save_line(record), flush=True)
        elif record["kind"] == "skip":
            print(self._skip_line(record), flush=True)

    def _skip_line(self, record: Record) -> str:
        line = f"step {record['iteration']:>{self.width}}/{self.train_iters} │ "
        if record["outcome"] == "left out":
            return line + f"left out, as training.skip_iterations says; skipped so far: {record['skipped_steps']}"
        reason = f"loss {record['loss']:.4f}, grad norm {record['grad_norm']:.4f}"
        if record["tokens"] == 0:
            reason = "none of its tokens has loss"
        return line + (
            f"no update: {reason}; in a row: {record['skipped_in_a_row']}, skipped so far: {record['skipped_steps']}"
        )

    def _save_line(self, record: Record) -> str:
        line = f"saved step {record['iteration']}: {record['stall_seconds']:.1f} s stall, "
        if record["asynchronous"]:
            line += f"{record['seconds']:.1f} s in all, "
        return line + size_text(record["num_bytes"])

    def _block_line(self, record: Record) -> str:
        return (
            f"step {record['iteration']:>{self.width}}/{self.train_iters} │ block {record['layer']:>3} │ "
            f"adds {record['contribution']:.2e} of the stream │ grad norm {record['grad_norm']:.2e} │ "
            f"distance {record['distance']:.2e} │ output norm {record['output_norm']:.2e}"
        )

    def _train_line(self, record: Record) -> str:
        return (
            f"step {record['iteration']:>{self.width}}/{self.train_iters} │ loss {record['loss']:7.4f} │ "
            f"grad norm {record['grad_norm']:8.4f} │ lr {record['learning_rate']:.2e} │ "
            f"{record['tokens_per_second']:>9,.0f} tokens/s │ {record['tflops_per_second']:7.3f} TFLOP/s a rank │ "
            f"{record['memory_gib']:6.2f} GiB"
        )


class JsonlWriter:
    """One JSON object a line. A run that continues at step n drops what an earlier start wrote beyond n."""

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if resumed_at and _iteration(line) <= resumed_at]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)

    def write(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def _iteration(line: str) -> float:
    """Step of a record; a line cut short by a kill counts as beyond every step."""
    try:
        return json.loads(line).get("iteration", 0)
    except json.JSONDecodeError:
        return float("inf")


class TensorBoardWriter:
    """Scalars under train/… and eval/<set>."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "logging.tensorboard_dir needs the tensorboard package: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(folder)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, record["iteration"])
        self.writer.flush()


class WandbWriter:
    """The same scalars, sent to Weights & Biases."""

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb_project needs the wandb package: pip install wandb") from None
        self.run = wandb.init(project=project)

    def write(self, record: Record) -> None:
        scalars = _scalars(record)
        if scalars:
            self.run.log(scalars, step=record["iteration"])


def _scalars(record: Record) -> dict[str, float]:
    if record["kind"] == "eval":
        return {f"eval/{record['name']}": record["loss"]}
    if record["kind"] == "block":
        return {f"block {record['layer']}/{name}": record[name] for name in BLOCK_FIGURES}
    if record["kind"] == "skip":
        return {"train/skipped_steps": record["skipped_steps"]}
    if record["kind"] == "train":
        return {f"train/{name}": value for name, value in record.items() if name not in ("kind", "iteration")}
    return {}


def metrics_path(config: LoggingConfig, *, save: str | None) -> Path:
    """Where the JSONL record goes."""
    return Path(config.metrics_file) if config.metrics_file else Path(save or ".") / "metrics.jsonl"


def open_writers(
    config: LoggingConfig, *, save: str | None, train_iters: int, resumed_at: int
) -> Sequence[MetricsWriter]:
    """The configured writers, for the one rank that reports."""
    writers: list[MetricsWriter] = [
        ConsoleWriter(train_iters=train_iters),
        JsonlWriter(metrics_path(config, save=save), resumed_at=resumed_at),
    ]
    if config.tensorboard_dir:
        writers.append(TensorBoardWriter(config.tensorboard_dir))
    if config.wandb_project:
        writers.append(WandbWriter(config.wandb_project))
    return writers
