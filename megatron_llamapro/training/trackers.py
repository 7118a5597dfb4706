"""Metrics for other programs: TensorBoard and Weights & Biases. Neither can end a run that has started.

A missing requirement (the package, a key, the network) is reported before the model is built. If a tracker fails later,
the run continues without it; metrics.jsonl has the full record.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from megatron_llamapro.config.command import in_one_line
from megatron_llamapro.config.errors import ConfigError, RunError
from megatron_llamapro.config.schema import LoggingConfig, RunConfig
from megatron_llamapro.training.metrics import BLOCK_FIGURES, Record
from megatron_llamapro.training.metrics_file import move_aside, warn

_ANSWER_SECONDS, _START_SECONDS, _END_SECONDS = 5.0, 60.0, 60.0
"""Time limits for the Weights & Biases server: to answer at all, to start a run, to take its last figures."""

_WITHOUT_SERVER = "leave it out, or set WANDB_MODE=offline and upload later (wandb sync)"


class Tracker(Protocol):
    """A writer that calls another program's code."""

    name: str

    def write(self, record: Record) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoardWriter:
    """Scalars under train/…, eval/<set> and block <n>/…"""

    name = "TensorBoard"

    def __init__(self, folder: str, *, resumed_at: int) -> None:
        """Hide the steps beyond `resumed_at` that an earlier start wrote. Move the events of an earlier run into their
        own folder, which TensorBoard shows as another run."""
        from torch.utils.tensorboard import SummaryWriter

        if resumed_at == 0 and not is_remote(folder):
            _keep_earlier_events(Path(folder))
        self._writer = SummaryWriter(folder, purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["iteration"])
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandbWriter:
    """The same scalars, sent to Weights & Biases, or kept for a later upload (WANDB_MODE=offline).

    All starts of a run continue the same Weights & Biases run, which `run_id` identifies.

    Raises:
        RunError: the server does not start the run.
    """

    name = "Weights & Biases"

    def __init__(self, config: RunConfig, *, folder: Path, run_id: str, plain_config: Mapping) -> None:
        import wandb

        limits = {"init_timeout": _START_SECONDS, "finish_timeout": _END_SECONDS}
        known = getattr(wandb.Settings, "model_fields", {})  # older versions have no finish_timeout
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_name or os.environ.get("WANDB_NAME") or folder.absolute().name,
                id=os.environ.get("WANDB_RUN_ID") or run_id,
                resume="allow",
                config=dict(plain_config),
                allow_val_change=True,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                settings=wandb.Settings(**{name: value for name, value in limits.items() if name in known}),
            )
        except Exception as error:  # another program's code can raise anything
            raise RunError(f"Weights & Biases did not start the run: {_reason(error)}") from error
        self._start_step = self._run.step

    def write(self, record: Record) -> None:
        scalars = _scalars(record)
        if scalars and record["iteration"] >= self._start_step:  # otherwise an earlier start has sent them
            self._run.log(scalars, step=record["iteration"])

    def close(self, *, failed: bool) -> None:
        import wandb

        try:
            self._run.finish(exit_code=int(failed))
        finally:
            wandb.teardown()  # otherwise it does so when the process ends, and prints tracebacks


class Guarded:
    """Wraps a tracker: its first failure is reported, then it is dropped."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker | None = tracker

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._call(lambda tracker: tracker.close(failed=kind is not None))

    def write(self, record: Record) -> None:
        self._call(lambda tracker: tracker.write(record))

    def _call(self, what: Callable[[Tracker], None]) -> None:
        if (tracker := self._tracker) is None:
            return
        try:
            what(tracker)
        except Exception as error:  # another program's code can raise anything
            self._tracker = None
            with contextlib.suppress(Exception):
                tracker.close(failed=True)
            warn(f"{tracker.name} failed ({_reason(error)}): the run continues without it; see the metrics file")


def check_trackers(config: LoggingConfig) -> None:
    """Raise `ConfigError` if a configured tracker cannot work. Takes seconds at most, and needs no model."""
    if config.tensorboard_dir and find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard_dir needs the tensorboard package: pip install tensorboard")
    if config.wandb_project:
        _check_wandb(config.wandb_project)


def _check_wandb(project: str) -> None:
    what = f"logging.wandb_project ({project})"
    if find_spec("wandb") is None:
        raise ConfigError(f"{what} needs the wandb package: pip install wandb")
    import wandb

    try:
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return
        _check_answers(settings.base_url, what)
        has_key = wandb.login(verify=True, timeout=round(_START_SECONDS))  # asks for a key on a terminal
    except ConfigError:
        raise
    except Exception as error:  # another program's code can raise anything
        has_key, reason = False, _reason(error).split(". ")[0].rstrip(".")
    else:
        reason = "no API key"
    if not has_key:
        raise ConfigError(f"{what}: {reason}: run `wandb login`, or set WANDB_API_KEY; else {_WITHOUT_SERVER}")


def _check_answers(url: str, what: str) -> None:
    """Raise `ConfigError` if the server does not answer; wandb would retry for minutes. Proxies come from the
    environment, as for wandb."""
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError:  # the server answered
        pass
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # wandb has its own certificates
            raise ConfigError(f"{what}: {url} cannot be reached ({reason}): {_WITHOUT_SERVER}") from None


def _reason(error: Exception) -> str:
    return in_one_line(error) or type(error).__name__


def is_remote(folder: str) -> bool:
    """Return whether only TensorBoard can write to this folder, e.g. s3://bucket/events."""
    return "://" in folder


def _keep_earlier_events(folder: Path) -> None:
    earlier = list(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
    if not earlier:
        return
    draft = folder / "earlier"
    draft.mkdir(exist_ok=True)
    for path in earlier:
        path.rename(draft / path.name)
    print(f"{folder} held the events of an earlier run: moved to {move_aside(draft)}", flush=True)


def _scalars(record: Record) -> dict[str, float]:
    if record["kind"] == "eval":
        return {f"eval/{record['name']}": record["loss"]}
    if record["kind"] == "block":
        return {f"block {record['layer']}/{name}": record[name] for name in BLOCK_FIGURES}
    if record["kind"] == "skip":
        return {"train/skipped_steps": record["skipped_steps"]}
    if record["kind"] == "train":
        figures = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        return {f"train/{name}": value for name, value in figures.items() if name != "iteration"}
    return {}
