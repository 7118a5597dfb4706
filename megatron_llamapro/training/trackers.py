"""Figures for other programs: TensorBoard and Weights & Biases. None of them can end a run that has begun.

What is missing for them (the package, a key, the network) is said before the model is built. Later they may fail: the
run goes on without them, and its record is in metrics.jsonl.
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
"""How long the server of Weights & Biases may take: to answer at all, to begin a run, to take its last figures."""

_WITHOUT_SERVER = "leave it out, or set WANDB_MODE=offline and upload later (wandb sync)"


class Tracker(Protocol):
    """A writer that another program's code is behind."""

    name: str

    def write(self, record: Record) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoardWriter:
    """Scalars under train/…, eval/<set> and block <n>/…"""

    name = "TensorBoard"

    def __init__(self, folder: str, *, resumed_at: int) -> None:
        """Steps beyond `resumed_at` that an earlier start wrote are hidden; those of an earlier run are moved into a
        folder of their own, which TensorBoard shows as another run."""
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
    """The same scalars, sent to Weights & Biases, or kept for it (WANDB_MODE=offline).

    All starts of a run go on with the same one there: it is found by `run_id`.

    Raises:
        RunError: the server does not begin the run.
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
        except Exception as error:  # of another program's code: anything
            raise RunError(f"Weights & Biases did not begin the run: {_reason(error)}") from error
        self._begun_at = self._run.step

    def write(self, record: Record) -> None:
        scalars = _scalars(record)
        if scalars and record["iteration"] >= self._begun_at:  # else an earlier start has sent the same
            self._run.log(scalars, step=record["iteration"])

    def close(self, *, failed: bool) -> None:
        import wandb

        try:
            self._run.finish(exit_code=int(failed))
        finally:
            wandb.teardown()  # else it does so when the process ends, and prints the traceback of what fails


class Guarded:
    """A tracker whose failure is said once; then it is left out."""

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
        except Exception as error:  # of another program's code: anything
            self._tracker = None
            with contextlib.suppress(Exception):
                tracker.close(failed=True)
            warn(f"{tracker.name} failed ({_reason(error)}): the run goes on without it (the metrics file has all)")


def check_trackers(config: LoggingConfig) -> None:
    """Raise `ConfigError` where a tracker that is asked for cannot work. Needs seconds at most, and no model."""
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
        has_key = wandb.login(verify=True, timeout=round(_START_SECONDS))  # which asks where there is a terminal
    except ConfigError:
        raise
    except Exception as error:  # of another program's code: anything
        has_key, reason = False, _reason(error).split(". ")[0].rstrip(".")
    else:
        reason = "no API key"
    if not has_key:
        raise ConfigError(f"{what}: {reason}: run `wandb login`, or set WANDB_API_KEY; else {_WITHOUT_SERVER}")


def _check_answers(url: str, what: str) -> None:
    """wandb would try again for minutes. Proxies are the environment's, as they are for wandb."""
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError:  # an answer
        pass
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # wandb has certificates of its own
            raise ConfigError(f"{what}: {url} cannot be reached ({reason}): {_WITHOUT_SERVER}") from None


def _reason(error: Exception) -> str:
    return in_one_line(error) or type(error).__name__


def is_remote(folder: str) -> bool:
    """Whether TensorBoard alone can write there, e.g. s3://bucket/events."""
    return "://" in folder


def _keep_earlier_events(folder: Path) -> None:
    earlier = list(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
    if not earlier:
        return
    draft = folder / "earlier"
    draft.mkdir(exist_ok=True)
    for path in earlier:
        path.rename(draft / path.name)
    print(f"{folder} had the events of an earlier run: they are in {move_aside(draft)} now", flush=True)


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
