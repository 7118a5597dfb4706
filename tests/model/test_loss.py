"""Loss and gradients of the chunked output layer equal the plain computation, with exactly the same matrix products."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.model.loss import VocabShard, give_loss, linear_cross_entropy
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import tiny_shape

TOKENS, HIDDEN, ROWS, VOCABULARY = 300, 48, 256, 131  # more than two chunks; almost half of the rows are padding
WHOLE = VocabShard(first=0, num_entries=VOCABULARY, is_padding=False, group=None)


def inputs(dtype: torch.dtype = torch.float32, *, hidden_trains: bool = True, weight_trains: bool = True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_(hidden_trains)
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_(weight_trains)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    scale = torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 3 > 0)  # every third token is masked
    return hidden, weight, labels, scale


# float32: the order of sums. bfloat16: logits and their gradients have 8 bits, losses are near 20.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("weight_trains", [False, True])
def test_it_equals_cross_entropy_in_float64(dtype: torch.dtype, weight_trains: bool) -> None:
    hidden, weight, labels, scale = inputs(dtype, weight_trains=weight_trains)
    losses = linear_cross_entropy(hidden, weight, labels, WHOLE)
    (losses * scale).sum().backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = cross_entropy((exact_hidden @ exact_weight.t())[:, :VOCABULARY], labels, reduction="none")
    (exact * scale).sum().backward()
    assert losses.dtype == torch.float32 and not hidden.grad[::3].any()
    pairs = [(losses, exact), (hidden.grad, exact_hidden.grad)]
    if weight_trains:
        assert not weight.grad[VOCABULARY:].any()
        pairs.append((weight.grad, exact_weight.grad))
    else:
        assert weight.grad is None
    for ours, expected in pairs:
        assert (ours.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()


PRODUCTS = {
    "evaluation": (False, False, 1),
    "head frozen": (True, False, 2),
    "head alone": (False, True, 2),
    "head and blocks": (True, True, 3),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_it_computes_no_extra_products(case: str) -> None:
    """Head forward, its input gradient if an earlier layer trains, its weight gradient if it trains itself. Padded rows
    are left out."""
    hidden_trains, weight_trains, products = PRODUCTS[case]
    hidden, weight, labels, scale = inputs(hidden_trains=hidden_trains, weight_trains=weight_trains)
    with FlopCounterMode(display=False) as counter:
        losses = linear_cross_entropy(hidden, weight, labels, WHOLE)
        if losses.requires_grad:
            (losses * scale).sum().backward()
    assert counter.get_total_flops() == products * 2 * TOKENS * HIDDEN * VOCABULARY
    assert losses.requires_grad == (hidden_trains or weight_trains)


def test_evaluation_computes_no_gradients() -> None:
    hidden, weight, labels, _ = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        losses = linear_cross_entropy(hidden, weight, labels, WHOLE)
    assert counter.get_total_flops() == 2 * TOKENS * HIDDEN * VOCABULARY
    assert torch.equal(losses, linear_cross_entropy(hidden, weight, labels, WHOLE))


def test_a_frozen_head_keeps_nothing_of_vocabulary_size() -> None:
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    hidden, weight, labels, _ = inputs(weight_trains=False)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels, WHOLE)
    assert kept == [TOKENS * HIDDEN]


def test_certain_and_impossible_tokens_do_not_overflow() -> None:
    """Logits 200 apart: the loss is 0 or 200."""
    weight = torch.eye(4)
    hidden = torch.tensor([[200.0, 0, 0, 0], [200.0, 0, 0, 0]], requires_grad=True)
    shard = VocabShard(first=0, num_entries=4, is_padding=False, group=None)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), shard)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 200.0]
    assert hidden.grad.tolist() == [[0, 0, 0, 0], [1, -1, 0, 0]]


LAYOUTS = {
    "one process": (1, False),
    "tp2": (2, False),
    "tp2 sequence parallel": (2, True),
    "tp4, two ranks with nothing but padding": (4, False),
}
TRAINABLE = {
    "head frozen": (False, ("decoder.",)),
    "head trains": (False, ("decoder.", "output_layer.")),
    "head alone": (False, ("output_layer.",)),
    "tied, frozen": (True, ("decoder.",)),
    "tied, trains": (True, ("decoder.", "embedding.")),
}


def model_worker(tensor_size: int, sequence_parallel: bool) -> list[str]:
    """Compute every case both ways on this rank's part of the model; return the names of the differences."""
    return [
        f"{case}: {name}"
        for case, (tied, trains) in TRAINABLE.items()
        for name in differences(tensor_size, sequence_parallel, tied=tied, trains=trains)
    ]


def differences(tensor_size: int, sequence_parallel: bool, *, tied: bool, trains: tuple[str, ...]) -> list[str]:
    from megatron_llamapro.config.schema import ModelConfig, ParallelConfig
    from megatron_llamapro.model.build import build_model
    from megatron_llamapro.runtime.distributed import start_model_parallel

    parallel = ParallelConfig(tensor_model_parallel_size=tensor_size, sequence_parallel=sequence_parallel)
    layout = start_model_parallel(parallel, seed=1)
    shape = tiny_shape(num_query_groups=4, tie_word_embeddings=tied)
    stream = torch.randint(shape.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(3, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for way in ("plain", "chunked"):
        settings = ModelConfig(checkpoint="", cross_entropy=way)
        [model] = build_model(shape, model=settings, parallel=parallel, precision="fp32")
        generator = torch.Generator().manual_seed(layout.tensor_rank)
        for name, parameter in model.named_parameters():
            shared = not getattr(parameter, "tensor_model_parallel", False)
            chosen = torch.Generator().manual_seed(7) if shared else generator
            parameter.data.normal_(std=0.3, generator=chosen)
            parameter.requires_grad_(name.startswith(trains))
        losses = model(stream[:, :-1], torch.arange(32)[None], None, labels=stream[:, 1:])
        (losses * scale).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())
        found.append({"losses": losses.detach(), **gradients})
    plain, chunked = found
    assert layout.tensor_rank > 0 or all(bool(x.any()) for x in plain.values())
    # another order of summation in float32
    return [name for name, x in plain.items() if (x - chunked[name]).norm() > 1e-5 * x.norm()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_megatrons_own_loss(layout: str) -> None:
    """Frozen, trainable and tied heads: losses and every gradient, on every rank."""
    world_size, sequence_parallel = LAYOUTS[layout]
    assert run_distributed(model_worker, world_size, world_size, sequence_parallel) == [[]] * world_size


def test_liger_is_refused_without_its_requirements() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device and the liger-kernel package"):
        give_loss(Layer(), vocab_size=8, cross_entropy="liger")  # type: ignore[arg-type]


class Layer:
    class tp_group:  # noqa: N801
        size = staticmethod(lambda: 1)
