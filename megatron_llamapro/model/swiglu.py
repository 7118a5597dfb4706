"""SwiGLU that keeps nothing but its input, and gives its memory back as the gradient."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


class _SwiGLU(torch.autograd.Function):
    """[…, gate f | up f] → silu(gate) · up, [… , f]

    The input is the output of a linear, which no other backward pass reads, and is as large as its gradient: the one
    is overwritten by the other. A second backward pass is refused by torch, as the input has changed.
    """

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        activated = silu(gate)
        up.mul_(gradient)
        torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=gate)
        torch.mul(activated, gradient, out=up)
        return both


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """[…, 2 f], gate before up → [… , f]"""
    return _SwiGLU.apply(both)
