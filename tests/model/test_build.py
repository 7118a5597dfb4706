"""Our own parts of the model: norm and attention."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_llamapro.testing.distributed import run_distributed


@pytest.mark.parametrize("tokens_before", [None, 0, 2, 3, 4, 100])
def test_attention_equals_the_formula(tokens_before: int | None) -> None:
    """softmax(q kᵀ / √d, causal and within the window) v, with each key head serving its group of query heads."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_llamapro.model.attention import SDPACoreAttention

    window = None if tokens_before is None else (tokens_before, 0)
    config = types.SimpleNamespace(attention_dropout=0.0, window_size=window, window_attn_skip_freq=None)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    query, key, value = (torch.randn(5, 2, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    ours = attention(query, key, value, None)
    key, value = (x.repeat_interleave(2, dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / 8**0.5
    hidden = torch.ones(5, 5).triu(1) + torch.ones(5, 5).tril(-6 if tokens_before is None else -tokens_before - 1)
    scores = scores.masked_fill(hidden.bool(), float("-inf"))
    expected = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).reshape(5, 2, 32)
    torch.testing.assert_close(ours, expected)


def test_each_layer_has_its_own_window() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_llamapro.model.attention import SDPACoreAttention

    config = types.SimpleNamespace(attention_dropout=0.0, window_size=(7, 0), window_attn_skip_freq=[0, 1, 1])
    layers = [SDPACoreAttention(config, number, AttnMaskType.causal, "self") for number in (1, 2, 3)]
    assert [layer.tokens_before for layer in layers] == [None, 7, 7]


def padding_worker(divisible_by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient with respect to this rank's logits, with garbage in the padded entries."""
    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.testing.tiny_models import tiny_shape

    parallel = ParallelConfig(tensor_model_parallel_size=torch.distributed.get_world_size())
    layout = start_model_parallel(parallel, seed=1)
    settings = ModelConfig(checkpoint="", make_vocab_size_divisible_by=divisible_by)
    [model] = build_model(tiny_shape(), model=settings, parallel=parallel, precision="fp32")
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(6, 2, 131, generator=generator), torch.full((6, 2, 1000), 50.0)], dim=-1)
    mine = logits[..., : model.vocab_size].chunk(layout.tensor_size, dim=-1)[layout.tensor_rank].clone()
    leaf = mine.requires_grad_()
    labels = torch.randint(0, 131, (2, 6), generator=generator)
    loss = model.compute_language_model_loss(labels, leaf * 1.0)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("divisible_by", "world_size"), [(1, 2), (128, 1), (128, 2), (200, 2)])
def test_padding_gets_no_probability(divisible_by: int, world_size: int) -> None:
    """Also if a whole rank holds only padding."""
    [(expected, gradient)] = run_distributed(padding_worker, 1, 1)
    ranks = run_distributed(padding_worker, world_size, divisible_by)
    whole = torch.cat([rank[1] for rank in ranks], dim=-1)
    torch.testing.assert_close(ranks[0][0], expected)
    torch.testing.assert_close(whole[..., :131], gradient)
    assert not whole[..., 131:].any()


def attention_worker(queries_a_group: int) -> list[bool]:
    """Return whether each parameter has the same gradient with the core attention recomputed."""
    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.runtime.distributed import start_model_parallel
    from megatron_llamapro.testing.tiny_models import tiny_shape

    start_model_parallel(ParallelConfig(), seed=1)
    shape = tiny_shape(num_query_groups=4 // queries_a_group)
    [model] = build_model(shape, model=ModelConfig(checkpoint=""), parallel=ParallelConfig(), precision="fp32")
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    stream = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for recomputed in (False, True):
        for layer in model.decoder.layers:
            layer.self_attention.checkpoint_core_attention = recomputed
        model.zero_grad()
        model(stream[:, :-1], torch.arange(8)[None], None, labels=stream[:, 1:]).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    return [torch.equal(a, b) and bool(a.any()) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("queries_a_group", [1, 2])
def test_recomputed_core_attention_has_the_same_gradients(queries_a_group: int) -> None:
    [same] = run_distributed(attention_worker, 1, queries_a_group)
    assert same and all(same)
