"""Root-mean-square norm that saves only its input and one number per token. A frozen weight costs no gradient."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, for any split of the sequence.

    megatron.core's wrapper of torch's norm refuses sequence parallelism. All that is missing is a mark on the weight:
    with it, `finalize_model_grads` sums the weight's gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, h] → the same shape."""
        if hidden_states.is_cuda:  # one kernel per direction; on the CPU torch composes it from a dozen
            return rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(hidden_states, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x²) + eps); computed in float32, or in x's type if that is wider."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        width = x.shape[-1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = length.square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        input_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (x * scale).mul_(gradient).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # dx = r g w - x r³ mean(g w x)
            weighted = gradient.to(scale.dtype) * weight
            along_x = (weighted * x).sum(dim=-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
            input_gradient = weighted.mul_(scale).sub_(x * along_x).to(x.dtype)
        return input_gradient, weight_gradient, None
