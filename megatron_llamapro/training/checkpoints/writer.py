"""How a state gets into a torch_dist folder: megatron.core's planning and file format, with our own way of writing.

Upstream's way (`dist_checkpointing.save`, 0.16.1) starts a manager process by spawn, which takes seconds and imports
the main script again, and two more processes for every save; it waits forever for one of those that was killed; and an
error of one rank, such as a full disk, leaves the others waiting in their next collective. Here each rank writes its
file by itself, in its own process or, asynchronously, in one forked from it, and every step at which one rank can fail
alone ends with an exchange of errors. The files are the same.
"""

from __future__ import annotations

import os
import pickle
import queue
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_llamapro.checkpoint.formats.folders import COMMON_STATE
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.runtime.distributed import failing_together, reason
from megatron_llamapro.runtime.stop import end_with_parent

_BACKEND, _VERSION = "torch_dist", 1


def plan_writing(state: dict, folder: Path, *, what: str) -> AsyncRequest:
    """Agree on who writes what of `state` into `folder`, and write its common part. All ranks call it.

    The request writes the tensors; its `finalize_fns` make the folder a checkpoint. `what` begins an error's line.

    Raises:
        CheckpointError: on all ranks, if any fails.
    """
    filesystem_async._results_queue = _Results()  # where upstream would start its manager process
    with failing_together(what):
        sharded, common = save_preprocess(state, preprocess_common_before_consistancy_check=_comparable)
    with failing_together(what):
        if torch.distributed.get_rank() == 0:
            torch.save(common, folder / COMMON_STATE)
    return _Strategy(folder, what).async_save(sharded, folder)


def _comparable(common: dict) -> dict:
    """What upstream compares between ranks, and warns of on every rank at every save: without empty tables, which only
    ranks that hold no tensor of some kind have."""
    tables = {key: _comparable(value) if isinstance(value, dict) else value for key, value in common.items()}
    return {key: value for key, value in tables.items() if value != {}}


def write_beside(request: AsyncRequest) -> AsyncRequest:
    """The request for a process that is forked to write: it ends with the run, else what it holds of the GPU and of the
    memory would be missed at the next start."""
    if request.async_fn is None:
        return request
    return request._replace(async_fn=partial(_in_fork, os.getpid(), request.async_fn))


def _in_fork(parent: int, write: Callable, *arguments: object) -> None:
    end_with_parent(parent)
    write(*arguments)


def write_now(request: AsyncRequest, *, what: str) -> None:
    """Do what a request asks for in this process. All ranks call it; errors as above."""
    with failing_together(what):
        if request.async_fn is not None:
            rank, _, results = request.async_fn_args
            request.async_fn(rank, request.preload_fn(), results)
    for finish in request.finalize_fns:
        finish()


class _Strategy(TorchDistSaveShardedStrategy):
    """Upstream's, that writes by `_write` and ends by exchanging errors."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(_BACKEND, _VERSION, thread_count=1)
        self._folder, self._what = folder, what

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret) -> AsyncRequest:
        _, preload, arguments = writer.get_save_function_and_args()
        _, index, group = save_state_dict_ret
        return AsyncRequest(
            partial(_write, [writer.transforms] if hasattr(writer, "transforms") else []) if arguments else None,
            arguments,
            [lambda: self._finish(writer, index, group)],
            preload_fn=preload,
        )

    def _finish(self, writer: FileSystemWriterAsync, index, group) -> None:
        """Write the index and the mark that the folder is complete, once every rank has written its file."""
        with failing_together(self._what):
            results = writer.retrieve_write_results()
            if not isinstance(results, list):  # an exception and its stack
                cause = results[0].__cause__ or results[0]
                raise CheckpointError(f"{self._what}: {cause}")
        gathered = group.gather_object(results)
        with failing_together(self._what):
            if group.is_coordinator:
                writer.finish(index, gathered)
                save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self._folder))


def _write(transforms: list, rank: int, buckets: Sequence, results: _Results) -> None:
    """Write this rank's files; what was written where, or why not, goes to `results`."""
    done: dict[int, list] = {}
    try:
        for number, bucket in enumerate(buckets):
            found, running = queue.SimpleQueue(), queue.Queue()
            running.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, found, running, use_fsync=True)
            _, written = found.get()
            if isinstance(written, Exception):
                raise written
            done[number] = written
    except Exception as error:
        results.put(RuntimeError(reason(error)))
    else:
        results.put(done)


class _Results:
    """A queue of one item between a process and its fork, without a process or a thread to serve it: a file in memory.

    A fork that is killed leaves it empty, which upstream reports as an error.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("write-results"), "w+b", buffering=0)  # noqa: SIM115 (closed with the object)

    def put(self, item: object) -> None:
        data = memoryview(pickle.dumps(item))
        while data:
            data = data[self._file.write(data) :]

    def get_nowait(self) -> object:
        self._file.seek(0)
        data = self._file.read()
        if not data:
            raise queue.Empty
        return pickle.loads(data)
