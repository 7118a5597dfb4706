"""The one place that makes "cuda" mean the CPU for megatron.core.

If there is no CUDA device, `install()` applies the table below once; on a GPU machine it changes nothing. So a laptop
and a cluster run the same code. Each row says what megatron.core 0.16.1 asks for, and where.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Substitution:
    """`owner.name` becomes `replacement(original)`."""

    owner: Any
    name: str
    replacement: Callable[[Any], Any]
    why: str

    def apply(self) -> None:
        original = getattr(self.owner, self.name, None)
        setattr(self.owner, self.name, self.replacement(original))


class NullStream:
    """A CUDA stream or event that does nothing, since everything already runs in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _device_on_cpu(original: Callable) -> Callable:
    """Wrap `original` so that a cuda device among its arguments becomes the CPU."""

    @functools.wraps(original)
    def on_cpu(*args, **kwargs):
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return original(*(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    return on_cpu


def _cuda_type_name(original: Callable) -> Callable:
    @functools.wraps(original)
    def type_name(self, *args, **kwargs):
        name = original(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    return type_name


def _without_device_ids(original: Callable) -> Callable:
    @functools.wraps(original)
    def barrier(group=None, async_op=False, device_ids=None):
        return original(group=group, async_op=async_op)

    return barrier


def _always(result: object) -> Callable[[Any], Callable]:
    """Make a replacement that returns `result` for any arguments."""
    return lambda original: lambda *args, **kwargs: result


def _instead(new: object) -> Callable[[Any], Any]:
    """Make a replacement that ignores the original."""
    return lambda original: new


_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn", "randint", "empty_like")
_FACTORIES += ("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "eye", "linspace")


def _to_itself(original: Callable) -> Callable:
    @functools.wraps(original)
    def cuda(self, *args, **kwargs):
        return self

    return cuda


def _torch_rows() -> list[Substitution]:
    cuda = torch.cuda
    rows = [
        Substitution(torch, name, _device_on_cpu, 'device="cuda" in clip_grads, optimizer, schedules')
        for name in _FACTORIES
    ]
    return [
        *rows,
        Substitution(torch.Tensor, "to", _device_on_cpu, 'Tensor.to("cuda") in optimizers and checkpointing'),
        Substitution(torch.Tensor, "cuda", _to_itself, "LanguageModule moves shared embeddings"),
        Substitution(torch.nn.Module, "cuda", _to_itself, "modules are moved after they are built"),
        Substitution(torch.Tensor, "type", _cuda_type_name, "optimizers sort parameters by torch.cuda.*Tensor"),
        Substitution(cuda, "current_device", _always(CPU), "device= of every buffer"),
        Substitution(cuda, "set_device", _always(None), "one process per device"),
        Substitution(cuda, "synchronize", _always(None), "p2p and timers"),
        Substitution(cuda, "Stream", _instead(NullStream), "communication streams of DDP"),
        Substitution(cuda, "Event", _instead(NullStream), "events of DDP and schedules"),
        Substitution(cuda, "stream", _always(contextlib.nullcontext()), "with torch.cuda.stream(…)"),
        Substitution(cuda, "current_stream", _always(NullStream()), "stream order before collectives"),
        Substitution(cuda, "default_stream", _always(NullStream()), "stream order before collectives"),
        Substitution(cuda, "manual_seed", _instead(torch.manual_seed), "seeds of the RNG tracker"),
        Substitution(cuda, "get_rng_state", lambda _: lambda device=None: torch.get_rng_state(), "RNG tracker"),
        Substitution(cuda, "set_rng_state", lambda _: _set_rng_state, "RNG tracker"),
        Substitution(cuda.nvtx, "range_push", _always(None), "profiling ranges"),
        Substitution(cuda.nvtx, "range_pop", _always(None), "profiling ranges"),
        Substitution(torch.distributed, "barrier", _without_device_ids, "barrier(device_ids=…) of checkpointing"),
    ]


def _megatron_rows() -> list[Substitution]:
    from megatron.core.tensor_parallel import random as megatron_random

    return [
        Substitution(
            megatron_random,
            "_get_cuda_rng_state",
            lambda _: lambda *a, **k: torch.get_rng_state(),
            "RNG tracker's fork",
        ),
        Substitution(megatron_random, "_set_cuda_rng_state", lambda _: _set_rng_state, "RNG tracker's fork"),
    ]


def _set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(state)


def table() -> list[Substitution]:
    """Return all substitutions, torch's before megatron's."""
    return _torch_rows() + _megatron_rows()


_installed = False


def install() -> bool:
    """Apply the table if there is no CUDA device. Return whether the CPU stands in for "cuda"."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        for row in table():
            row.apply()
        # The tracker's fork warns if the CPU generator changes inside it. Here it is also the "cuda" generator.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
        _installed = True
    return True
