"""One rank of any world, on tensors without data: nothing is computed, sent or allocated, but every shape is known.

torch's fake tensors and its fake process group do the work. The table below replaces the calls in which megatron.core
0.16.1 reads data, or uses a collective without a fake kernel. It applies only while the fake world exists.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llamapro.runtime.cpu import Substitution


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[FakeTensorMode]:
    """Make this process `rank` of `world_size`, and every new tensor fake. No other world may be started inside."""
    # On a GPU, compiled kernels would be launched on invalid pointers.
    with _substituted(table()), torch.compiler.set_stance("force_eager"):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                yield mode
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@contextlib.contextmanager
def watched_messages(bytes_by_direction: Counter[str]) -> Iterator[None]:
    """Count the bytes that this rank sends to other stages: `activations` to the next, `gradients` to the previous."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def watching(communicate):
        def counted(self, *, tensor_send_next, tensor_send_prev, **messages):
            for direction, tensor in (("activations", tensor_send_next), ("gradients", tensor_send_prev)):
                if tensor is not None:
                    bytes_by_direction[direction] += tensor.nbytes
            return communicate(self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, **messages)

        return counted

    row = Substitution(P2PCommunicator, "_communicate", watching, "only this method knows the content of a message")
    with _substituted([row]):
        yield


def table() -> list[Substitution]:
    """Return all substitutions."""
    return [*_tensor_rows(), *_distributed_rows(), *_megatron_rows()]


def _tensor_rows() -> list[Substitution]:
    """Replace reads of values: token counts, gradient norms, steps. 1 is as good as any value."""
    values = {
        "item": lambda self: 1.0 if self.is_floating_point() else 1,
        "tolist": lambda self: _ones(self.shape, 1.0 if self.is_floating_point() else 1),
        "__bool__": lambda self: True,
        "__float__": lambda self: 1.0,
        "__int__": lambda self: 1,
    }
    return [Substitution(FakeTensor, name, _instead(value), "it has no value") for name, value in values.items()]


def _ones(shape: Sequence[int], one: float) -> object:
    return [_ones(shape[1:], one) for _ in range(shape[0])] if shape else one


def _distributed_rows() -> list[Substitution]:
    return [
        Substitution(dist, "new_group", _fake_group, "parallel_state asks for gloo and NCCL groups"),
        Substitution(dist, "all_gather_object", _instead(_all_say_the_same), "param groups, error exchange"),
        Substitution(dist, "barrier", _instead(lambda *args, **kwargs: None), "no rank to wait for"),
    ]


def _megatron_rows() -> list[Substitution]:
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    return [
        Substitution(
            param_and_grad_buffer,
            "_coalescing_manager",
            _instead(_one_by_one),
            "coalesced reduce-scatter has no fake kernel: its collectives are counted one by one",
        ),
        Substitution(
            CudaRNGStatesTracker,
            "fork",
            _instead(lambda self, name="": contextlib.nullcontext()),
            "compares random states, which are data",
        ),
    ]


def _instead(new: object):
    return lambda original: new


def _fake_group(new_group):
    def fake_group(*args, **kwargs):
        return new_group(*args, **{**kwargs, "backend": "fake", "pg_options": None})

    return fake_group


def _all_say_the_same(objects: list, mine: object, group: object = None) -> None:
    objects[:] = [mine] * len(objects)


class _NoHandle:
    """The handle of a coalescing manager, with nothing to wait for."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _one_by_one(group: object, async_ops: bool = False) -> Iterator[_NoHandle]:
    yield _NoHandle()


@contextlib.contextmanager
def _substituted(rows: Sequence[Substitution]) -> Iterator[None]:
    """Apply the rows, and undo them at the end."""
    absent = object()
    before = [vars(row.owner).get(row.name, absent) for row in rows]
    for row in rows:
        row.apply()
    try:
        yield
    finally:
        for row, original in zip(rows, before, strict=True):
            if original is absent:
                delattr(row.owner, row.name)
            else:
                setattr(row.owner, row.name, original)
