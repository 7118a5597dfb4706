"""SwiGLU that saves only its input, and writes the gradient into the input's memory."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


class _SwiGLU(torch.autograd.Function):
    """[…, gate f | up f] → silu(gate) · up, [… , f].

    The input is the output of a linear layer. No other backward pass reads it, and its gradient has the same size, so
    the gradient overwrites it. torch refuses a second backward pass, because the input has changed.
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
    """[…, 2 f], gate before up → [… , f]."""
    return _SwiGLU.apply(both)
