"""Every substitution of the CPU runtime does what megatron.core expects from CUDA. With a GPU none is active."""

from __future__ import annotations

import torch

from megatron_llamapro.testing.distributed import run_distributed


def calls_worker() -> dict[str, object]:
    """Use each row of the table as megatron.core does."""
    from megatron.core.tensor_parallel import random as megatron_random

    cuda = torch.cuda
    event, stream = cuda.Event(enable_timing=True), cuda.Stream(device="cuda")
    with cuda.stream(stream):
        event.record(cuda.current_stream())
        stream.wait_event(event)
        cuda.default_stream().wait_stream(stream)
        stream.synchronize()
        event.wait()
    cuda.set_device(0)
    cuda.synchronize()
    cuda.nvtx.range_push("x")
    cuda.nvtx.range_pop()
    torch.distributed.barrier(device_ids=[0])
    cuda.manual_seed(3)
    state = cuda.get_rng_state()
    first = torch.rand(2, device="cuda")
    cuda.set_rng_state(state)
    again = torch.rand(2, device="cuda")
    state = megatron_random._get_cuda_rng_state()
    third = torch.rand(2)
    megatron_random._set_cuda_rng_state(state)
    fourth = torch.rand(2)
    made = {
        "zeros": torch.zeros(2, device="cuda"),
        "ones": torch.ones(2, device="cuda"),
        "empty": torch.empty(2, device=torch.device("cuda", 0)),
        "tensor": torch.tensor([1.0], device="cuda"),
        "full": torch.full((2,), 1.0, device="cuda"),
        "arange": torch.arange(2, device="cuda"),
        "rand": torch.rand(2, device="cuda"),
        "randn": torch.randn(2, device="cuda"),
        "randint": torch.randint(2, (2,), device="cuda"),
        "eye": torch.eye(2, device="cuda"),
        "linspace": torch.linspace(0, 1, 2, device="cuda"),
        "to": torch.zeros(2).to("cuda"),
        "cuda": torch.zeros(2).cuda(),
        "module": torch.nn.Linear(1, 1).cuda().weight,
    }
    for name in ("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like"):
        made[name] = getattr(torch, name)(torch.zeros(2), device="cuda")
    made["full_like"] = torch.full_like(torch.zeros(2), 1.0, device="cuda")
    return {
        "devices": {name: tensor.device.type for name, tensor in made.items()},
        "current": str(cuda.current_device()),
        "type": torch.zeros(1).type(),
        "cast": torch.zeros(1).type(torch.float64).dtype,
        "repeatable": torch.equal(first, again) and torch.equal(third, fourth),
    }


def test_cuda_calls_use_the_cpu() -> None:
    [found] = run_distributed(calls_worker, 1)
    assert set(found["devices"].values()) == {"cpu"}
    assert found["current"] == "cpu"
    assert found["type"] == "torch.cuda.FloatTensor" and found["cast"] == torch.float64
    assert found["repeatable"]


def test_every_row_has_a_reason_and_a_place_of_its_own() -> None:
    from megatron_llamapro.runtime.cpu import table

    rows = table()
    assert all(row.why for row in rows)
    places = [(id(row.owner), row.name) for row in rows]
    assert len(places) == len(set(places))


def test_nothing_is_substituted_with_a_gpu(monkeypatch) -> None:
    from megatron_llamapro.runtime import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.zeros
    assert cpu.install() is False
    assert torch.zeros is before
