"""Writes a run's checkpoints: `save/iter_0000100/`, complete or absent, at once or while training continues.

A folder is written under a temporary name and renamed when every rank is done. Only then does
`latest_checkpointed_iteration.txt` name it. A kill at any moment, even during an asynchronous save, leaves the last
complete checkpoint loadable.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_llamapro.checkpoint.formats.adapters import AdapterRecord
from megatron_llamapro.checkpoint.formats.delta import Delta
from megatron_llamapro.checkpoint.formats.folders import LATEST, iteration_folder, iteration_of
from megatron_llamapro.checkpoint.formats.small_files import SmallFiles
from megatron_llamapro.checkpoint.side_files import copy_side_files
from megatron_llamapro.config.drafts import sync, sync_tree
from megatron_llamapro.config.errors import LlamaProError, RunError
from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.expansion.manifest import MANIFEST_NAME
from megatron_llamapro.families.hf_config import CONFIG_NAME
from megatron_llamapro.runtime.distributed import failing_together, from_first_rank
from megatron_llamapro.training.checkpoints.delta_parts import delta_of_run, trained_keys
from megatron_llamapro.training.checkpoints.resume import RunIdentity
from megatron_llamapro.training.checkpoints.state import TrainingState, model_state, training_state
from megatron_llamapro.training.checkpoints.torch_dist_save import plan_writing, write_beside, write_now
from megatron_llamapro.training.machine import Machine


@dataclass
class _Save:
    """A checkpoint that is being written."""

    iteration: int
    folder: Path
    """Its final path."""
    draft: Path
    """The path that it is written to."""
    started: float
    stall_seconds: float = 0.0
    """Time until training could continue."""
    num_bytes: int = 0
    """Size of all its files; set on rank 0 when it is complete."""

    @property
    def what(self) -> str:
        return f"step {self.iteration} was not saved in {self.folder.parent} (the last checkpoint is intact)"


class Saver:
    """Writes a run's checkpoints. Every rank makes one, and all ranks call its methods together.

    The methods return a `save` record for each checkpoint that they complete. They raise `RunError`, on all ranks, if
    something cannot be written.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        config: RunConfig,
        state: TrainingState,
        identity: RunIdentity,
        source: SmallFiles,
        resume_from: SmallFiles | None,
    ) -> None:
        """`source` is the checkpoint that the run started from; `resume_from` is its own checkpoint to resume
        from."""
        self._machine, self._run_config, self._config = machine, config, config.checkpoint
        self._state, self._identity, self._source = state, identity, source
        self._folder = Path(str(self._config.save))
        with failing_together(f"checkpoint.save ({self._folder}) cannot be written"):
            if dist.get_rank() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self._folder)
        self._delta = self._make_delta(resume_from) if self._config.delta else None
        self._origin = self._folder / self._delta.base if self._delta else source.folder
        self._queue = AsyncCallsQueue()
        self._pending: _Save | None = None
        self.latest: int | None = None
        """The step that was saved last or is being saved."""

    def _make_delta(self, resume_from: SmallFiles | None) -> Delta | None:
        trained = trained_keys(model_state(self._machine.chunks))
        if trained is None:
            return None
        return delta_of_run(self._folder, source=self._source, resume_from=resume_from, trained=trained)

    def save(self) -> list[dict]:
        """Save the current state, asynchronously if so configured. First wait until an earlier save is complete."""
        finished = self.finish()
        with self._cleaning_up():
            save = self._pending = self._begin()
            request = plan_writing(self._everything(), save.draft, what=save.what)
            request.add_finalize_fn(lambda: self._publish(save))
            if self._config.async_save:
                self._schedule(request, save)
                return finished
            write_now(request, what=save.what)
        save.stall_seconds = time.monotonic() - save.started
        return [*finished, self._complete()]

    def poll(self) -> list[dict]:
        """Complete a save whose files are written by now, without waiting; call it after every step."""
        return self._finalize(wait=False)

    def finish(self) -> list[dict]:
        """Wait until a pending save is complete."""
        return self._finalize(wait=True)

    def _finalize(self, *, wait: bool) -> list[dict]:
        if self._pending is None:
            return []
        with self._cleaning_up():
            done = self._queue.maybe_finalize_async_calls(blocking=wait)
        return [self._complete()] if done else []

    def _begin(self) -> _Save:
        """Make the folder to write into. Its name is new, so that a killed run's last writes go elsewhere."""
        iteration = self.latest = self._state.iteration
        name = from_first_rank(uuid.uuid4().hex[:8])
        folder = iteration_folder(self._folder, iteration)
        save = _Save(iteration, folder, folder.with_name(f"{folder.name}.{name}.tmp"), time.monotonic())
        with failing_together(save.what):
            if dist.get_rank() == 0:
                clear_leftovers(self._folder)
                save.draft.mkdir(parents=True)
        return save

    def _everything(self) -> dict:
        return training_state(self._machine, state=self._state, identity=self._identity, delta=self._delta)

    def _schedule(self, request: AsyncRequest, save: _Save) -> None:
        with failing_together(save.what):
            self._queue.schedule_async_request(write_beside(request))
        save.stall_seconds = time.monotonic() - save.started

    def _publish(self, save: _Save) -> None:
        """Add the small files and make the folder the newest checkpoint, in an order that survives a kill."""
        with failing_together(save.what):
            if dist.get_rank() == 0:
                self._write_small_files(save.draft)
                publish(save.draft, save.folder)
                save.num_bytes = sum(path.stat().st_size for path in save.folder.rglob("*") if path.is_file())
        with failing_together(f"{self._folder}: older checkpoints could not be removed"):
            if dist.get_rank() == 0:
                prune(
                    self._folder,
                    newest=save.iteration,
                    keep_last=self._config.keep_last,
                    keep_every=self._config.keep_every,
                    needed=[self._source.folder],
                )

    def _write_small_files(self, draft: Path) -> None:
        """Write the files that, with the tensors, make the folder a checkpoint for every tool."""
        copy_side_files(self._origin, draft)
        for name in (CONFIG_NAME, MANIFEST_NAME):
            shutil.copyfile(self._origin / name, draft / name)
        if self._delta is not None:
            self._delta.write(draft)
        lora = self._run_config.lora
        if lora.rank is not None:
            AdapterRecord(lora.rank, lora.scaling * lora.rank).write(draft)
        (draft / "run.yaml").write_text(dump_yaml(self._run_config))

    def _complete(self) -> dict:
        save, self._pending = self._pending, None
        assert save is not None  # called only for a pending save
        return {
            "kind": "save",
            "iteration": save.iteration,
            "stall_seconds": save.stall_seconds,
            "seconds": time.monotonic() - save.started,
            "num_bytes": save.num_bytes,
            "delta": self._delta is not None,
            "asynchronous": self._config.async_save,
        }

    @contextlib.contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """On a failed save, which all ranks know of: delete the draft and raise `RunError`; a restart may succeed."""
        try:
            yield
        except LlamaProError as error:
            save, self._pending = self._pending, None
            if save is not None and dist.get_rank() == 0:
                shutil.rmtree(save.draft, ignore_errors=True)
            failed = RunError(str(error))
            failed.on_all_ranks = error.on_all_ranks
            raise failed from error


def publish(draft: Path, folder: Path) -> None:
    """Make a finished folder the newest checkpoint of its run."""
    sync_tree(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    latest = folder.parent / LATEST
    renewed = latest.with_name(f"{LATEST}.tmp")
    renewed.write_text(f"{int(folder.name.removeprefix('iter_'))}\n")
    sync(renewed)
    renewed.replace(latest)
    sync(folder.parent)


LEFTOVERS = "iter_*.tmp"
"""Folders that are not checkpoints: half written or half removed."""


def superseded(iterations: Collection[int], *, newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Return which of a run's checkpoints to remove, oldest first. `newest`, the last complete one, and any newer ones
    stay."""
    if keep_last is None:
        return []
    older = sorted(iteration for iteration in iterations if iteration < newest)
    spared = older[max(0, len(older) - (keep_last - 1)) :]  # besides the newest
    return [i for i in older if i not in spared and not (keep_every and i % keep_every == 0)]


def prune(
    save: Path, *, newest: int, keep_last: int | None, keep_every: int | None, needed: Collection[Path] = ()
) -> None:
    """Remove the checkpoints that `superseded` returns, except those `needed`. Bases are not checkpoints of a step, and
    stay."""
    found = map(iteration_of, save.iterdir())
    iterations = [iteration for iteration in found if iteration is not None]
    spared = {path.resolve() for path in needed}
    for iteration in superseded(iterations, newest=newest, keep_last=keep_last, keep_every=keep_every):
        folder = iteration_folder(save, iteration)
        if folder.resolve() not in spared:
            removed = folder.with_name(f"{folder.name}.removed.tmp")
            folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(save: Path) -> None:
    """Remove the leftovers of a run that was killed while it wrote or removed a checkpoint."""
    for leftover in save.glob(LEFTOVERS):
        shutil.rmtree(leftover, ignore_errors=True)
