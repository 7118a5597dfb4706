"""Skips work for frozen parts: everything below the first trainable layer runs forward only, without autograd.

That part saves nothing for a backward pass. A chunk of layers wholly below the first trainable layer has no backward
pass, and the first chunk that trains sends no gradient to the one before it (`training/communication.py` skips the
messages). Recomputation starts at the first trainable layer. Works with any megatron.core GPTModel; see
docs/in_your_own_loop.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_llamapro.expansion.trainable import OUTSIDE_PARTS
from megatron_llamapro.model.names import NamedParameter, named_parameters, unwrapped
from megatron_llamapro.runtime.upstream import become

# Name prefixes of parameters after the layers. The only other part outside them, the embedding, comes before.
_AFTER_LAYERS = (OUTSIDE_PARTS["final_norm"], OUTSIDE_PARTS["output_layer"])


@dataclass(frozen=True)
class Reach:
    """How far backward passes reach into one chunk (a stage, or a virtual stage)."""

    receives_gradient: bool = True
    """From the chunk after it. False if nothing in this chunk or below it trains."""
    sends_gradient: bool = True
    """To the chunk before it. False if nothing below this chunk trains."""
    num_layers_below: int = 0
    """Layers of this chunk below the first trainable one."""


def reach_of(chunk: torch.nn.Module, first_trainable_layer: int) -> Reach:
    """Return how far backward passes reach into a GPTModel. `first_trainable_layer` is an index in the whole model: -1
    if the embedding trains, the number of layers if only the final norm or the head trains."""
    first_here = get_transformer_layer_offset(chunk.config, getattr(chunk, "vp_stage", None))
    after = first_here + len(chunk.decoder.layers)
    return Reach(
        receives_gradient=chunk.post_process or first_trainable_layer < after,
        sends_gradient=first_trainable_layer < first_here,
        num_layers_below=max(0, min(first_trainable_layer, after) - first_here),
    )


def find_first_trainable_layer(chunks: Sequence[torch.nn.Module]) -> int:
    """Return the index of the first trainable layer in the whole model, by `requires_grad`. `reach_of` explains the
    numbering. All ranks call it."""
    first = min(map(_first_trainable_layer_of, chunks))
    if torch.distributed.is_initialized():
        of_all_ranks = [first] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all_ranks, first)
        first = min(of_all_ranks)
    return first


def _first_trainable_layer_of(chunk: torch.nn.Module) -> int:
    after_layers = unwrapped(chunk).config.num_layers

    def layer_of(named: NamedParameter) -> int:
        if named.layer is not None:
            return named.layer
        return after_layers if named.name.startswith(_AFTER_LAYERS) else -1

    training = (named for named in named_parameters([chunk]) if named.parameter.requires_grad)
    return min(map(layer_of, training), default=after_layers)


def skip_frozen_work(chunks: Sequence[torch.nn.Module], first_trainable_layer: int | None = None) -> None:
    """Make this rank's GPTModels run without autograd below `first_trainable_layer`; if None, all ranks find it
    together. The models' `reach` tells the schedule which gradients exist. Call this once on every rank, after `freeze`
    and before DDP wraps the models.

    Raises:
        ConfigError: a decoder is not megatron.core's own TransformerBlock.
    """
    if first_trainable_layer is None:
        first_trainable_layer = find_first_trainable_layer(chunks)
    for chunk in chunks:
        chunk.reach = reach = reach_of(chunk, first_trainable_layer)
        become(chunk.decoder, FrozenAwareBlock).num_layers_below = reach.num_layers_below
        if reach.sends_gradient:
            continue
        below = [*chunk.decoder.layers[: reach.num_layers_below]]
        if chunk.pre_process:
            below.append(chunk.embedding)
        for module in below:
            wrap_method(module, "forward", torch.no_grad())
        wrap_method(chunk, "set_input_tensor", _detached)
        if chunk.config.recompute_granularity == "selective":
            for layer in chunk.decoder.layers[reach.num_layers_below :][:1]:
                wrap_method(layer, "forward", _with_gradient)


def wrap_method(owner: torch.nn.Module, method: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace a method of one module by what `wrapper` makes of it."""
    setattr(owner, method, wrapper(getattr(owner, method)))


def _detached(set_input_tensor: Callable) -> Callable:
    """Make `set_input_tensor` pass on a tensor without grad. megatron.core's schedules receive into a tensor that
    requires grad and later look for its gradient. The new tensor takes over its bytes, so that they are freed as soon
    as the model no longer needs them."""

    @functools.wraps(set_input_tensor)
    def detached(input_tensor):
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is None:
            return set_input_tensor(input_tensor)
        hidden_states = received.detach()
        received.data = received.new_empty(1)
        return set_input_tensor(hidden_states)

    return detached


def _with_gradient(forward: Callable) -> Callable:
    """Make the input of a layer's `forward` require grad. Activation checkpointing looks only at its inputs; without
    grad on them, the layer's parameters would get no gradient."""

    @functools.wraps(forward)
    def with_gradient(hidden_states, *args, **kwargs):
        return forward(requiring_grad(hidden_states), *args, **kwargs)

    return with_gradient


def requiring_grad(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the same values, with `requires_grad` set if gradients are enabled."""
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states
    return hidden_states.detach().requires_grad_()


class FrozenAwareBlock(TransformerBlock):
    """TransformerBlock whose full recomputation skips layers without a backward pass, and counts layers from the first
    trainable one. It becomes the class of a GPTModel's decoder.

    Upstream checkpoints the frozen layers too, and a range whose input does not require grad gets no gradient at all.
    With method uniform, upstream also fails if `recompute_num_layers` does not divide the layers.
    """

    num_layers_below: int = 0

    def _checkpointed_forward(self, hidden_states: torch.Tensor, **arguments: object) -> torch.Tensor:
        """hidden_states [s, b, h] → the same shape. Every layer gets the other arguments unchanged."""
        arguments.pop("use_inner_quantization_context")

        def run(start: int, stop: int, hidden_states: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[start:stop]:
                hidden_states, _ = layer(hidden_states=hidden_states, **arguments)
            return hidden_states

        below, end = self.num_layers_below, len(self.layers)
        hidden_states = run(0, below, hidden_states)
        if not torch.is_grad_enabled():
            return run(below, end, hidden_states)
        hidden_states = requiring_grad(hidden_states)
        num_layers = self.config.recompute_num_layers
        step, recomputed_to = (
            (num_layers, end) if self.config.recompute_method == "uniform" else (1, below + num_layers)
        )
        recomputed_to = min(recomputed_to, end)
        for start in range(below, recomputed_to, step):
            stop = min(start + step, recomputed_to)
            hidden_states = tensor_parallel.checkpoint(functools.partial(run, start, stop), False, hidden_states)
        return run(recomputed_to, end, hidden_states)
