"""The helper for tests with several processes: results in rank order, and errors instead of hangs."""

from __future__ import annotations

import pytest
import torch

from megatron_llamapro.testing.distributed import run_distributed


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(torch.distributed.get_rank() + offset)
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), int(total)


def test_results_come_in_rank_order() -> None:
    assert run_distributed(sum_of_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("the reason")
    torch.distributed.barrier()


def test_a_failing_rank_fails_the_test_at_once() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the reason"):
        run_distributed(fail_on_one, 2)
