"""Messages between pipeline stages, without the gradients that no stage needs.

megatron.core's schedules send and await a gradient for every activation. A chunk of layers that lies wholly below the
first trainable layer needs none (`model.skip_frozen.Reach`): the next chunk sends none, and this chunk awaits none.
Both sides compute this from the same numbers, so they exchange no message about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.model.names import unwrapped
from megatron_llamapro.model.skip_frozen import Reach
from megatron_llamapro.runtime.distributed import process_groups


class FrozenAwareCommunicator(P2PCommunicator):
    """megatron.core's communicator, for one step. megatron.core does not send a gradient that a chunk does not compute
    (it is None); this class does not await it either."""

    def __init__(self, pp_group: torch.distributed.ProcessGroup, config: TransformerConfig, awaited: Iterator[bool]):
        super().__init__(pp_group=pp_group, config=config)
        self.awaited = awaited

    def _communicate(self, *, recv_next: bool, **messages: object) -> tuple:
        return super()._communicate(recv_next=recv_next and next(self.awaited), **messages)


def communication(chunks: Sequence[torch.nn.Module], num_microbatches: int) -> dict[str, object]:
    """Return the arguments of one call of megatron.core's schedule; none if there is only one stage.

    Raises:
        ConfigError: overlap_p2p_comm is on; the interleaved schedule then counts its messages.
    """
    groups = process_groups()
    if groups.pp.size() == 1:
        return {}
    models = [unwrapped(chunk) for chunk in chunks]
    reaches = [getattr(model, "reach", Reach()) for model in models]
    config = models[0].config
    if config.overlap_p2p_comm:
        raise ConfigError("overlap_p2p_comm cannot be on when frozen stages send no gradients: set it to False")
    order = backward_order(
        len(chunks),
        num_microbatches,
        group_size=config.microbatch_group_size_per_vp_stage,
        is_last_stage=groups.pp.rank() == groups.pp.size() - 1,
    )
    awaited = (reaches[chunk].receives_gradient for chunk in order)
    return {
        "p2p_communicator": FrozenAwareCommunicator(groups.pp, config, awaited),
        "pg_collection": groups,
    }


def backward_order(
    num_chunks: int, num_microbatches: int, *, group_size: int | None, is_last_stage: bool
) -> Iterator[int]:
    """Yield the chunk that each gradient is for, in the order in which megatron.core's schedules await gradients on one
    rank. The last chunk of the last stage awaits none, because it computes the loss."""
    if num_chunks == 1:
        yield from [] if is_last_stage else [0] * num_microbatches
        return
    for _, chunk in get_schedule_table(num_microbatches, num_chunks, group_size):
        backward_chunk = num_chunks - 1 - chunk
        if not (is_last_stage and backward_chunk == num_chunks - 1):
            yield backward_chunk
