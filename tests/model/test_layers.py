"""Norm, activation and rotation against their formulas: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from megatron_llamapro.model.attention import _Rotate, _RotateAndSplit
from megatron_llamapro.model.norm import _RMSNorm
from megatron_llamapro.model.swiglu import swiglu

SEQUENCE, BATCH, GROUPS, SIZE = 5, 2, 3, 8
# float32: another order of summation. bfloat16: 8 bits.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def saved_elements(function, *inputs) -> int:
    """Return the number of activation elements kept for a backward pass."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs)
    return sum(kept.values())


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours.double() - expected.double()).norm() <= TOLERANCES[ours.dtype] * expected.double().norm())


@pytest.mark.parametrize("weight_trains", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_norm_equals_torchs(dtype: torch.dtype, weight_trains: bool) -> None:
    x, weight, gradient = random(7, 3, 16, dtype=dtype), random(16, dtype=dtype), random(7, 3, 16, dtype=dtype)
    found = []
    for function in (_RMSNorm.apply, lambda x, weight, eps: rms_norm(x.double(), (16,), weight.double(), eps)):
        leaf, weight_leaf = x.clone().requires_grad_(), weight.clone().requires_grad_(weight_trains)
        y = function(leaf, weight_leaf, 1e-3)
        y.backward(gradient.to(y.dtype))
        found.append((y.detach(), leaf.grad, weight_leaf.grad))
    ours, expected = found
    assert ours[0].dtype == ours[1].dtype == dtype
    assert close(ours[0], expected[0]) and close(ours[1], expected[1])
    assert close(ours[2], expected[2]) if weight_trains else ours[2] is None


def test_norm_keeps_its_input_and_one_number_per_token() -> None:
    x, weight = random(7, 16).requires_grad_(), random(16)
    assert saved_elements(_RMSNorm.apply, x, weight, 1e-5) == 7 * 16 + 16 + 7


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_swiglu_equals_the_formula(dtype: torch.dtype) -> None:
    both, gradient = random(5, 2, 24, dtype=dtype), random(5, 2, 12, dtype=dtype)
    leaf, exact = both.clone().requires_grad_(), both.double().requires_grad_()
    y = swiglu(leaf * 1.0)
    y.backward(gradient)
    gate, up = exact.chunk(2, dim=-1)
    expected = silu(gate) * up
    expected.backward(gradient.double())
    assert close(y.detach(), expected.detach()) and close(leaf.grad, exact.grad)


def test_swiglu_keeps_only_its_input_and_refuses_a_second_backward_pass() -> None:
    both = random(5, 24).requires_grad_()
    assert saved_elements(swiglu, both * 1.0) == 5 * 24
    y = swiglu(both * 1.0)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def tables() -> torch.Tensor:
    angles = random(SEQUENCE, 1, 1, 1, SIZE // 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Return x cos + rotate_half(x) sin, as in transformers."""
    cosine, sine = (torch.cat([table, table], dim=-1) for table in tables())
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_rotation_and_split_equal_the_formula(queries: int) -> None:
    heads = random(SEQUENCE, BATCH, GROUPS, queries + 2, SIZE)
    leaf, exact = heads.clone().requires_grad_(), heads.clone().requires_grad_()
    ours = _RotateAndSplit.apply(leaf * 1.0, tables())
    query, key, value = exact.split((queries, 1, 1), dim=3)
    expected = (rotated(query), rotated(key), value)
    gradients = [random(*part.shape) for part in ours]
    for part, same in zip(ours, expected, strict=True):
        torch.testing.assert_close(part, same)
    torch.autograd.backward(ours, gradients)
    torch.autograd.backward(expected, gradients)
    torch.testing.assert_close(leaf.grad, exact.grad)


def test_rotation_copies_nothing() -> None:
    """Queries, keys and values are views of the one input tensor, the only tensor kept."""
    heads = random(SEQUENCE, BATCH, GROUPS, 4, SIZE).requires_grad_() * 1.0
    parts = _RotateAndSplit.apply(heads, tables())
    assert {part.untyped_storage().data_ptr() for part in parts} == {heads.untyped_storage().data_ptr()}
    assert saved_elements(_RotateAndSplit.apply, heads, tables()) == heads.numel() + tables().numel()


def test_rotation_alone_equals_the_formula() -> None:
    leaf = random(SEQUENCE, BATCH, GROUPS, 2, SIZE).requires_grad_()
    exact = leaf.detach().clone().requires_grad_()
    gradient = random(SEQUENCE, BATCH, GROUPS, 2, SIZE + 0)
    ours, expected = _Rotate.apply(leaf, tables()), rotated(exact)
    ours.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(leaf.grad, exact.grad)
