"""The world, the place of a rank in it, and errors that all ranks share."""

from __future__ import annotations

import torch

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.testing.distributed import run_distributed


def layout_worker(parallel: ParallelConfig):
    from megatron_llamapro.runtime.distributed import start_model_parallel

    return start_model_parallel(parallel, seed=1)


def test_layout() -> None:
    """megatron.core's order: tensor ranks beside each other, then replicas, then stages."""
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


def test_one_ranks_error_is_everyones() -> None:
    assert run_distributed(raise_worker, 2) == [("gone (on rank 1)", True)] * 2
