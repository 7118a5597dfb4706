"""Communication between data-parallel replicas: collectives of one rank, and pending parameter gathers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_llamapro.runtime.upstream import become


class BucketGroupOfOne(_ParamAndGradBucketGroup):
    """The gradients and parameters of a single replica. Set as the class of a bucket group that DDP made.

    megatron.core calls the collectives for a group of one rank too. With gloo that costs three copies of all gradients
    and one of all parameters.
    """

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Do everything that upstream does except the reduction."""
        for bucket in self.buckets:
            if bucket.gradient_scaling_factor != 1.0:
                bucket.grad_data *= bucket.gradient_scaling_factor

    def start_param_sync(self, force_sync: bool = False) -> None:
        self.param_gather_dispatched = True


def skip_collectives_of_one(ddp: DistributedDataParallel) -> None:
    """Skip the data-parallel collectives of groups with one rank. Overlapped collectives stay, since upstream waits for
    their handles."""
    overlaps = ddp.ddp_config.overlap_grad_reduce or ddp.ddp_config.overlap_param_gather
    for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
        if group.intra_distributed_optimizer_instance_size == 1 and not overlaps:
            become(group, BucketGroupOfOne)


def finish_param_gathers(chunks: Sequence[torch.nn.Module]) -> None:
    """Bring every weight of `chunks` up to date with the last update. All ranks call it before weights are read outside
    a forward pass.

    Each replica updates its share of the trainable weights. With `overlap_param_gather` the other shares arrive during
    the next forward pass (megatron.core's pre-hooks); until then they are one step old. Nothing is sent without that
    option, on bare models, or if a forward pass has run since the update.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)
