"""What megatron.core forgets is there once it is imported."""

from __future__ import annotations

import torch

from megatron_llamapro.testing.distributed import run_distributed


def router_worker() -> dict[str, torch.Tensor]:
    """Logits of megatron.core's router and their gradients, without Transformer Engine."""
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    tokens, weight = (torch.arange(6.0).reshape(size).requires_grad_() for size in ((2, 3), (2, 3)))
    logits = router_gating_linear(tokens, weight, None, torch.float32)
    logits.sum().backward()
    return {"logits": logits.detach(), "tokens": tokens.grad, "weight": weight.grad}


def test_routers_work_without_transformer_engine() -> None:
    """megatron.core 0.16.1 raises NameError: te_general_gemm."""
    [found] = run_distributed(router_worker, 1)
    tokens = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(found["logits"], tokens @ tokens.T)
    assert torch.equal(found["weight"], tokens.sum(0).expand(2, 3))
