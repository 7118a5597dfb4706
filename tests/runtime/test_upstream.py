"""Omissions of megatron.core are mended once it is imported, and its objects can become ours."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.model.attention import RotaryTables
from megatron_llamapro.optimizer.replicas import BucketGroupOfOne
from megatron_llamapro.runtime.upstream import become
from megatron_llamapro.testing.distributed import run_distributed


def router_worker() -> dict[str, torch.Tensor]:
    """Return logits of megatron.core's router and their gradients, without Transformer Engine."""
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


class UsersEmbedding(RotaryEmbedding):
    """Has a method of its own, which another class would lose."""

    def forward(self, *args, **kwargs):
        return None


def test_an_object_becomes_ours_and_keeps_its_state() -> None:
    embedding = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
    frequencies = embedding.inv_freq
    assert become(embedding, RotaryTables) is embedding
    assert type(become(embedding, RotaryTables)) is RotaryTables  # a second time changes nothing
    assert embedding.inv_freq is frequencies


@pytest.mark.parametrize("built", [UsersEmbedding(8, 1.0, use_cpu_initialization=True), torch.nn.Module()], ids=type)
def test_an_object_of_another_class_is_refused(built: torch.nn.Module) -> None:
    before = type(built)
    with pytest.raises(
        ConfigError, match=f"this object is a .*{before.__name__}, .* with megatron.core's RotaryEmbedding"
    ):
        become(built, RotaryTables)
    assert type(built) is before


def test_a_change_without_effect_is_refused(monkeypatch) -> None:
    """For example after megatron.core renamed the method."""
    monkeypatch.delattr(_ParamAndGradBucketGroup, "start_param_sync")
    group = object.__new__(_ParamAndGradBucketGroup)
    with pytest.raises(
        ConfigError, match=r"_ParamAndGradBucketGroup\.start_param_sync, which .* megatron-core==0\.16\.1"
    ):
        become(group, BucketGroupOfOne)
