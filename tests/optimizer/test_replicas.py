"""A single replica calls no data-parallel collectives, and computes the same as with them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llamapro.testing.distributed import run_distributed


class Collectives(TorchDispatchMode):
    """Counts the elements passed to data-parallel collectives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "_tensor_coalesced" in func.__name__:
            self.elements += sum(tensor.numel() for tensor in args[0])
        return func(*args, **(kwargs or {}))


def steps_worker(folder: Path, alone: bool) -> tuple[int, list]:
    from gradients import gradients_worker, parallel
    from megatron_llamapro.training import machine

    if not alone:
        machine.skip_collectives_of_one = lambda ddp: None
    with Collectives() as called:
        steps = gradients_worker(folder, parallel(), 2)
    return called.elements, [(loss, norm) for loss, norm, _ in steps]


def test_a_single_replica_reduces_nothing_and_takes_the_same_steps(models) -> None:
    folder = models().expanded_megatron
    [(elements, steps)] = run_distributed(steps_worker, 1, folder, True)
    [(upstreams, expected)] = run_distributed(steps_worker, 1, folder, False)
    assert elements == 0 < upstreams
    assert steps == expected and len({loss for loss, _ in steps}) == 2
    assert all(torch.isfinite(torch.tensor(step)).all() for step in steps)
