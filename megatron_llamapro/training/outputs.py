"""A run's locks and its writers.

`claimed` locks the places that no other run may write to at the same time. It runs before the model is built, so that a
place that is in use or not writable is reported at once. `open_writers` runs after that, when the run is sure to start.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_llamapro.config.command import in_one_line
from megatron_llamapro.config.errors import ConfigError, RunError
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.config.io import to_plain
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.runtime.distributed import failing_together
from megatron_llamapro.runtime.lock import RunLock
from megatron_llamapro.training.metrics import ConsoleWriter, MetricsWriter, metrics_path
from megatron_llamapro.training.metrics_file import JsonlWriter
from megatron_llamapro.training.trackers import Guarded, TensorBoardWriter, WandbWriter, is_remote

RUN_ID = "run_id.txt"
"""A file in checkpoint.save with the run's ID, by which all starts of a run recognise their records."""


@contextlib.contextmanager
def claimed(config: RunConfig) -> Iterator[None]:
    """Lock the places that the run writes to, for this run alone. All ranks call it.

    Raises:
        ConfigError, RunError: on all ranks: another run writes to one of the places, or one is not writable.
    """
    with contextlib.ExitStack() as held:
        with failing_together("the run's folders"):
            if dist.get_rank() == 0:
                _check_metrics(_metrics(config))
                for lock, what in _places(config).items():
                    with _naming(what):
                        held.enter_context(RunLock(lock, what))
        yield


def _metrics(config: RunConfig) -> Path:
    return metrics_path(config.logging, save=config.checkpoint.save)


def _check_metrics(path: Path) -> None:
    what = f"logging.metrics_file ({path})"
    with _naming(what):
        if not path.exists():
            return
        if not path.is_file():  # /dev/null would be replaced
            raise ConfigError(f"{what} is not a file: name one")
        path.open("ab").close()


def _places(config: RunConfig) -> Mapping[Path, str]:
    """Return lock files, each with the option that it stands for. A metrics file has its own lock, because several runs
    may keep theirs in one folder."""
    save, logging, places = config.checkpoint.save, config.logging, {}
    if save:
        places[Path(save).resolve() / "run.lock"] = f"checkpoint.save ({save})"
    if logging.metrics_file or not save:
        metrics = _metrics(config)
        places[metrics.resolve().with_name(f"{metrics.name}.lock")] = f"logging.metrics_file ({metrics})"
    if logging.tensorboard_dir and not is_remote(logging.tensorboard_dir):
        events = Path(logging.tensorboard_dir).resolve() / "run.lock"
        places.setdefault(events, f"logging.tensorboard_dir ({logging.tensorboard_dir})")
    return places


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Raise an `OSError` as one of our errors: an impossible path is the configuration's fault, a full disk is not."""
    try:
        yield
    except FileExistsError as error:  # from mkdir: a parent is a file
        raise ConfigError(f"{what} cannot be written: {error.filename} is not a folder") from None
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(f"{what} cannot be written: {in_one_line(error)}") from None
    except OSError as error:
        raise RunError(f"{what} cannot be written: {in_one_line(error)}") from None


@contextlib.contextmanager
def open_writers(config: RunConfig, *, resumed_at: int) -> Iterator[Sequence[MetricsWriter]]:
    """Open the configured writers on rank 0; the other ranks get none. All ranks call it.

    Raises:
        LlamaProError: on all ranks, if a writer cannot be opened.
    """
    writers: list = []
    with contextlib.ExitStack() as opened:
        with failing_together("the run's records"):
            if dist.get_rank() == 0:
                with _naming("the run's records"):
                    writers = list(_open(config, resumed_at, opened))
        yield writers


def _open(config: RunConfig, resumed_at: int, opened: contextlib.ExitStack) -> Iterator[MetricsWriter]:
    run_id, path, logging = _run_id(config, resumed_at), _metrics(config), config.logging
    yield ConsoleWriter(train_iters=config.training.train_iters)
    yield opened.enter_context(contextlib.closing(JsonlWriter(path, resumed_at=resumed_at, run_id=run_id)))
    if logging.tensorboard_dir:
        events = TensorBoardWriter(logging.tensorboard_dir, resumed_at=resumed_at)
        yield opened.enter_context(Guarded(events))
    if logging.wandb_project:
        plain = to_plain(config)
        assert isinstance(plain, dict)
        wandb = WandbWriter(config, folder=path.parent, run_id=run_id, plain_config=plain)
        yield opened.enter_context(Guarded(wandb))


def _run_id(config: RunConfig, resumed_at: int) -> str:
    """Return the ID of the resumed run, or a new one, which is stored beside its checkpoints."""
    file = Path(config.checkpoint.save) / RUN_ID if config.checkpoint.save else None
    if file is not None and resumed_at and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    if file is not None:
        write_atomically(file, f"{run_id}\n")
    return run_id
