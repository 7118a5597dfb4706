"""A penalty on what added blocks add to the residual stream, so that they change little where little is to be learned.

For the input x and the output y of a block, both [s, b, h], a token's relative contribution is

    r = |y - x|^2 / |x|^2,    with the denominator held constant, and 0 if x is 0.

The penalty is its weight times the mean of r over tokens and over all added blocks that train, on all stages. If only
tokens of known sources count, the sum over them is still divided by the number of all tokens that have a loss, so the
share of these sources acts as a part of the weight.

The gradient with respect to y, and negated with respect to x, is a closed form in x and y. Each block adds it in its
own backward pass, in float32: there is no second forward pass, no communication, and no matrix product. It is exact at
any layout and with recomputation. Works with any megatron.core GPTModel; see docs/in_your_own_loop.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.model.names import global_layer_index, unwrapped
from megatron_llamapro.model.skip_frozen import wrap_method

# The argument of a decoder that carries the token weights to its layers: TransformerBlock passes it to every layer
# unchanged, also when it recomputes one. Models without cross-attention do not use it.
_CARRIER = "context_mask"


@dataclass
class BlockPenalty:
    """The penalty on the added blocks of one model chunk."""

    weight: float
    """Of the mean over blocks and tokens."""
    num_blocks: int
    """Blocks with a penalty, in the whole model."""
    is_divided: bool
    """Whether tensor-parallel ranks hold different tokens (sequence parallelism). Otherwise they hold the same."""
    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum over this chunk's blocks and tokens of token weight times r, since the last `restart`."""

    def restart(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())


def penalise_added_blocks(
    chunks: Sequence[torch.nn.Module], plan: ExpansionPlan, *, weight: float, num_blocks: int | None = None
) -> None:
    """Give the added blocks with trainable parameters a penalty of `weight`. `num_blocks` is their number in the whole
    model; if None, all ranks count them together. Call this once on every rank, after `freeze` and before DDP wraps the
    models. Pass `penalty_arguments` in every call of a model that trains.

    Raises:
        ConfigError: no added block trains, or the model is fp16.
    """
    if any(unwrapped(chunk).config.fp16 for chunk in chunks):
        # Its gradient does not pass through the scaled loss, so the optimizer would divide it by the loss scale.
        raise ConfigError("a penalty on added blocks needs bf16 or fp32: fp16 scales the loss, but not the penalty")
    layers = {
        chunk: [layer for layer in chunk.decoder.layers if global_layer_index(layer) in plan.added_layers]
        for chunk in map(unwrapped, chunks)
    }
    training = {chunk: [layer for layer in of_chunk if _trains(layer)] for chunk, of_chunk in layers.items()}
    if num_blocks is None:
        num_blocks = _count_on_all_ranks(layer for of_chunk in training.values() for layer in of_chunk)
    if not num_blocks:
        raise ConfigError(
            "no added block trains, so there is nothing to penalise: name added_blocks in trainable, or have no penalty"
        )
    for chunk, of_chunk in training.items():
        chunk.penalty = penalty = BlockPenalty(weight, num_blocks, chunk.config.sequence_parallel)
        penalty.restart()
        for layer in of_chunk:
            wrap_method(layer, "forward", functools.partial(_with_penalty, penalty))


def penalty_arguments(chunk: torch.nn.Module, token_weights: torch.Tensor) -> dict[str, object]:
    """Return the arguments of a call of a GPTModel (or of DDP around it) that make its blocks' penalties count; none if
    it has no penalty.

    `token_weights` is [b, s]. A token's weight is the factor of its loss in the backward pass: its loss mask if
    megatron.core divides by the number of tokens at the end (`calculate_per_token_loss`), otherwise its loss mask
    divided by the number of tokens and micro-batches. 0 leaves a token out of the penalty. Every stage needs the
    weights. A call without these arguments, and one without autograd, has no penalty.
    """
    model = unwrapped(chunk)
    if not hasattr(model, "penalty"):
        return {}
    weights = token_weights.t()  # [s, b], as hidden states
    if model.config.sequence_parallel:
        group = model.pg_collection.tp
        weights = weights.chunk(group.size())[group.rank()]
    return {"extra_block_kwargs": {_CARRIER: weights.contiguous()}}


def penalties_of(chunks: Iterable[torch.nn.Module]) -> list[BlockPenalty]:
    """Return the penalties of the model chunks; none if they have none."""
    return [model.penalty for model in map(unwrapped, chunks) if hasattr(model, "penalty")]


def _trains(layer: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _count_on_all_ranks(layers: Iterable[torch.nn.Module]) -> int:
    """Return the number of different layers on all ranks. All ranks call it."""
    mine = sorted(map(global_layer_index, layers))
    of_all_ranks = [mine]
    if torch.distributed.is_initialized():
        of_all_ranks = of_all_ranks * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all_ranks, mine)
    return len({layer for of_rank in of_all_ranks for layer in of_rank})


def _with_penalty(penalty: BlockPenalty, forward: Callable) -> Callable:
    """Make a TransformerLayer's `forward` add the gradient of its penalty in the backward pass."""

    @functools.wraps(forward)
    def with_penalty(hidden_states, *args, **kwargs):
        token_weights = kwargs.pop(_CARRIER, None)
        output, *rest = forward(hidden_states, *args, **kwargs)
        if token_weights is not None and output.requires_grad:
            output = _PenaltyGradient.apply(hidden_states, output, token_weights, penalty)
        return output, *rest

    return with_penalty


class _PenaltyGradient(torch.autograd.Function):
    """x [s, b, h], y [s, b, h], token weights [s, b] → y. The backward pass adds the penalty's gradient.

    x and y are kept, not copied: the norms of this block and of the next one keep them too. The result is another
    tensor over y's bytes, because megatron.core frees a stage's output (`deallocate_pipeline_outputs`) by giving that
    one tensor other bytes. If the block is the last of its stage, y is therefore kept until its backward pass.
    """

    @staticmethod
    def forward(ctx, before, after, token_weights, penalty):
        ctx.save_for_backward(before, after, token_weights)
        ctx.penalty = penalty
        return after.detach()

    @staticmethod
    def backward(ctx, gradient):
        before, after, token_weights = ctx.saved_tensors
        penalty = ctx.penalty
        added = after.to(torch.float32, copy=True).sub_(before)  # [s, b, h]
        squared = _squared_norm(before)  # [s, b]
        per_square = torch.where(squared > 0, token_weights.float() / squared, 0.0)
        penalty.total += (per_square * _squared_norm(added)).sum()
        added *= (per_square * (2 * penalty.weight / penalty.num_blocks))[..., None]
        before_gradient = added.neg().to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return before_gradient, added.add_(gradient).to(gradient.dtype), None, None


def _squared_norm(hidden_states: torch.Tensor) -> torch.Tensor:
    """[s, b, h] → [s, b], in float32, without a float32 copy of the whole."""
    return torch.linalg.vector_norm(hidden_states, dim=-1, dtype=torch.float32).square()
