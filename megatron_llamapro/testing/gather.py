"""Gathers whole logits and gradients of a sharded model, so that a test can compare them with one process's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_llamapro.checkpoint.tensors.weight_map import row_blocks, weights_of
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.training.checkpoints.state import model_state


@dataclass(frozen=True)
class RankPiece:
    """A part of a global tensor."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


def whole_logits(chunks: Sequence[torch.nn.Module], tokens: torch.Tensor, *, vocab_size: int) -> torch.Tensor | None:
    """Return the logits of `tokens` [b, s], [b, s, vocab_size], on ranks of the last stage, None on the others."""
    batch, seq_length = tokens.shape
    position_ids = torch.arange(seq_length).expand(batch, seq_length)

    def forward_step(_: object, chunk: torch.nn.Module):
        return chunk(tokens, position_ids, None), lambda logits, non_loss_data: logits

    for chunk in chunks:
        chunk.eval()
    num_microbatches = dist.get_world_size() if len(chunks) > 1 else 1  # the interleaved schedule needs one per stage
    with torch.no_grad():
        logits = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not logits:
        return None
    return gather_from_tensor_model_parallel_region(logits[0])[..., :vocab_size].contiguous()


def gradient_pieces(chunks: Sequence[torch.nn.Module], *, data_group: dist.ProcessGroup) -> list[RankPiece]:
    """Return this rank's part of every trainable parameter's gradient, after a backward pass through DDP."""
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                _fill_from_all_replicas(bucket.grad_data, data_group)
    pieces = []
    for tensors in model_state(chunks).values():
        for sharded in tensors.values():
            if getattr(sharded.data, "requires_grad", False):
                pieces += [_piece(part) for part in _parts(sharded, sharded.data.main_grad)]
    return pieces


def _fill_from_all_replicas(gradients: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Put the replicas' shares of a bucket together: the distributed optimizer reduces on each replica only its own."""
    shares = gradients.view(group.size(), -1)
    for rank in range(group.size()):
        if rank != group.rank():
            shares[rank].zero_()
    dist.all_reduce(gradients, group=group)


def _parts(sharded: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> Iterable[ShardedTensor]:
    with_data = replace(sharded, data=data)
    return with_data.build() if isinstance(with_data, ShardedTensorFactory) else [with_data]


def _piece(part: ShardedTensor) -> RankPiece:
    data = part.data.reshape(*[1] * part.prepend_axis_num, *part.data.shape)  # one expert of all
    return RankPiece(part.key, tuple(part.global_shape), tuple(part.global_offset), data.clone())


def assembled(pieces: Iterable[RankPiece]) -> dict[str, torch.Tensor]:
    """Return whole tensors by megatron.core's key, from the pieces of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for piece in pieces:
        target = whole.setdefault(piece.key, torch.full(piece.global_shape, torch.nan))
        place = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.data.shape, strict=True))
        target[place] = piece.data
    return whole


def under_hf_names(tensors: Mapping[str, torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """Return the same tensors, split into Hugging Face's tensors and with their names."""
    result = {}
    for weight in weights_of(shape):
        if weight.megatron_name in tensors:
            merged = tensors[weight.megatron_name]
            rows = merged.flatten(0, -2) if merged.dim() > 1 else merged
            for name, size in zip(weight.hf_names, weight.hf_shapes, strict=True):
                result[name] = torch.empty(size, dtype=merged.dtype)
            for block in row_blocks(weight, shape):
                stop = block.merged_start + block.num_rows
                result[block.part][block.part_start :][: block.num_rows] = rows[block.merged_start : stop]
    return result
