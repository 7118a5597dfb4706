"""An optimizer step in two halves, so that the gradient norm decides whether to update.

`ChainedOptimizer.step` of megatron.core 0.16.1 does both halves at once, in this order. It skips the update only if a
gradient scaler found an overflow; bf16 and fp32 have no scaler.
"""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Hand the gradients to the optimizer and return their global norm. All ranks call it and get the same norm."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: MegatronOptimizer, *, grad_norm: float) -> None:
    """Clip the gradients, whose norm is `grad_norm`, and update parameters and moments."""
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
