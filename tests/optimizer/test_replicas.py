"""A replica that is alone computes what it would with the collectives, and calls none."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llamapro.testing.distributed import run_distributed


class Collectives(TorchDispatchMode):
    """Elements that data-parallel collectives were called with."""

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


def test_nothing_is_reduced_and_the_steps_are_the_same(models) -> None:
    folder = models().expanded_megatron
    [(elements, steps)] = run_distributed(steps_worker, 1, folder, True)
    [(upstreams, expected)] = run_distributed(steps_worker, 1, folder, False)
    assert elements == 0 < upstreams
    assert steps == expected and len({loss for loss, _ in steps}) == 2
    assert all(torch.isfinite(torch.tensor(step)).all() for step in steps)
