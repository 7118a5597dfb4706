"""Writes a state into a torch_dist folder: megatron.core's planning and file format, with our own way of writing.

Upstream's `dist_checkpointing.save` (0.16.1) has these problems:
- It spawns a manager process, which takes seconds and imports the main script again, and two more processes per save.
- It waits forever for one of those two processes if it is killed.
- An error of one rank, such as a full disk, leaves the other ranks waiting in their next collective.

Here each rank writes its own file, in its own process or, asynchronously, in a fork of it. Every step at which one rank
can fail alone ends with an exchange of errors. The files are the same.
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
    """Agree on which rank writes which part of `state` into `folder`, and write the common part. All ranks call it.

    The returned request writes the tensors; its `finalize_fns` turn the folder into a checkpoint. `what` starts every
    error message.

    Raises:
        CheckpointError: on all ranks, if any rank fails.
    """
    filesystem_async._results_queue = _Results()  # upstream would start its manager process for it
    with failing_together(what):
        sharded, common = save_preprocess(state, preprocess_common_before_consistancy_check=_comparable)
    with failing_together(what):
        if torch.distributed.get_rank() == 0:
            torch.save(common, folder / COMMON_STATE)
    return _Strategy(folder, what).async_save(sharded, folder)


def _comparable(common: dict) -> dict:
    """Return `common` without empty tables, which only ranks without some kind of tensor have. Upstream compares common
    states between ranks, and would warn of such tables on every rank at every save."""
    tables = {key: _comparable(value) if isinstance(value, dict) else value for key, value in common.items()}
    return {key: value for key, value in tables.items() if value != {}}


def write_beside(request: AsyncRequest) -> AsyncRequest:
    """Return the request for a forked process that writes. The fork ends with the run; otherwise it would hold GPU and
    host memory that the next start needs."""
    if request.async_fn is None:
        return request
    return request._replace(async_fn=partial(_in_fork, os.getpid(), request.async_fn))


def _in_fork(parent: int, write: Callable, *arguments: object) -> None:
    end_with_parent(parent)
    write(*arguments)


def write_now(request: AsyncRequest, *, what: str) -> None:
    """Run a request in this process. All ranks call it. Raises the errors of `plan_writing`."""
    with failing_together(what):
        if request.async_fn is not None:
            rank, _, results = request.async_fn_args
            request.async_fn(rank, request.preload_fn(), results)
    for finish in request.finalize_fns:
        finish()


class _Strategy(TorchDistSaveShardedStrategy):
    """Upstream's strategy, except that it writes with `_write` and ends with an exchange of errors."""

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
        """Write the index and the mark of a complete folder, after every rank has written its file."""
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
    """Write this rank's files. Put a record of what was written, or the error, into `results`."""
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
    """A queue of one item between a process and its fork. It is a file in memory, so no process or thread serves it.

    If the fork is killed, the queue stays empty, and upstream reports that as an error.
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
