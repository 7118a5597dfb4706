"""The world, a rank's place in it, and errors shared by all ranks."""

from __future__ import annotations

import torch

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.testing.distributed import run_distributed


def layout_worker(parallel: ParallelConfig):
    from megatron_llamapro.runtime.distributed import start_model_parallel

    return start_model_parallel(parallel, seed=1)


def test_ranks_are_ordered_tensor_data_pipeline() -> None:
    """megatron.core's order: tensor ranks are adjacent, then replicas, then stages."""
    ranks = run_distributed(layout_worker, 4, ParallelConfig(pipeline_model_parallel_size=2))
    assert [(rank.pipeline_rank, rank.data_rank) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [rank.is_last_stage for rank in ranks] == [False, False, True, True]


def raise_worker() -> tuple[str, bool]:
    from megatron_llamapro.runtime.distributed import raise_together

    raise_together(None)
    try:
        raise_together(DataError("gone") if torch.distributed.get_rank() == 1 else None)
    except DataError as error:
        return str(error), error.on_all_ranks
    return "no error", False


def test_one_ranks_error_is_raised_on_every_rank() -> None:
    assert run_distributed(raise_worker, 2) == [("gone (on rank 1)", True)] * 2


def ask_worker() -> tuple[int, str, bool]:
    from megatron_llamapro.runtime.distributed import ask_first_rank

    def fail() -> int:
        raise DataError(f"gone on rank {torch.distributed.get_rank()}")

    found = ask_first_rank(torch.distributed.get_rank)
    try:
        ask_first_rank(fail)
    except DataError as error:
        return found, str(error), error.on_all_ranks
    raise AssertionError


def test_rank_0s_result_or_error_reaches_every_rank() -> None:
    assert run_distributed(ask_worker, 2) == [(0, "gone on rank 0", True)] * 2
