"""Work that frozen parts save: what lies below the first trainable layer runs forward only, without autograd.

Nothing there is kept for a backward pass, a chunk of layers that lies wholly below takes no part in one, and the first
chunk that trains sends no gradient to the one before it (`training/communication.py` leaves the messages out).
Recomputation begins at the first trainable layer. Usable with any megatron.core GPTModel; see docs/in_your_own_loop.md.
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

# The start of names of parameters that come after the layers; what else lies outside them comes before.
_BEHIND_LAYERS = (OUTSIDE_PARTS["final_norm"], OUTSIDE_PARTS["output_layer"])


@dataclass(frozen=True)
class Reach:
    """How far backward passes reach into one chunk (a stage, or a virtual stage)."""

    receives_gradient: bool = True
    """From the chunk after it. Not so where nothing in this chunk or below it trains."""
    sends_gradient: bool = True
    """To the chunk before it. Not so where nothing below this chunk trains."""
    num_layers_below: int = 0
    """Layers of this chunk below the first trainable one."""


def reach_of(chunk: torch.nn.Module, first_trainable_layer: int) -> Reach:
    """How far backward passes reach into a GPTModel where `first_trainable_layer` is the first that trains, of the
    whole model: -1 where the embedding trains, the number of layers where only the final norm or the head does."""
    first_here = get_transformer_layer_offset(chunk.config, getattr(chunk, "vp_stage", None))
    after = first_here + len(chunk.decoder.layers)
    return Reach(
        receives_gradient=chunk.post_process or first_trainable_layer < after,
        sends_gradient=first_trainable_layer < first_here,
        num_layers_below=max(0, min(first_trainable_layer, after) - first_here),
    )


def find_first_trainable_layer(chunks: Sequence[torch.nn.Module]) -> int:
    """The first layer of the whole model that trains, as `reach_of` takes it, from what requires grad. All ranks call
    it."""
    first = min(map(_first_trainable_layer_of, chunks))
    if torch.distributed.is_initialized():
        of_all_ranks = [first] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all_ranks, first)
        first = min(of_all_ranks)
    return first


def _first_trainable_layer_of(chunk: torch.nn.Module) -> int:
    behind_layers = unwrapped(chunk).config.num_layers

    def layer_of(named: NamedParameter) -> int:
        if named.layer is not None:
            return named.layer
        return behind_layers if named.name.startswith(_BEHIND_LAYERS) else -1

    training = (named for named in named_parameters([chunk]) if named.parameter.requires_grad)
    return min(map(layer_of, training), default=behind_layers)


def skip_frozen_work(chunks: Sequence[torch.nn.Module], first_trainable_layer: int | None = None) -> None:
    """Prepare this rank's GPTModels: below `first_trainable_layer` they run without autograd, and their `reach` tells
    the schedule which gradients there are. Without that number the ranks look for it together, in what requires grad.
    Call it once, after `freeze` and before DDP wraps them; all ranks do.

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
            _replace(module, "forward", torch.no_grad())
        _replace(chunk, "set_input_tensor", _detached)
        if chunk.config.recompute_granularity == "selective":
            for layer in chunk.decoder.layers[reach.num_layers_below :][:1]:
                _replace(layer, "forward", _with_gradient)


def _replace(owner: torch.nn.Module, method: str, wrapper: Callable[[Callable], Callable]) -> None:
    setattr(owner, method, wrapper(getattr(owner, method)))


def _detached(set_input_tensor: Callable) -> Callable:
    """megatron.core's schedules receive into a tensor that requires grad, and look for its gradient afterwards: it is
    given up for one that does not, over the same bytes, which are then freed as soon as the model needs them no more.
    """

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
    """A layer whose input requires grad: else a checkpoint inside it, which asks its inputs only, gives its parameters
    no gradient at all."""

    @functools.wraps(forward)
    def with_gradient(hidden_states, *args, **kwargs):
        return forward(requiring_grad(hidden_states), *args, **kwargs)

    return with_gradient


def requiring_grad(hidden_states: torch.Tensor) -> torch.Tensor:
    """The same values, requiring grad where gradients are computed at all."""
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states
    return hidden_states.detach().requires_grad_()


class FrozenAwareBlock(TransformerBlock):
    """Set as the class of a GPTModel's decoder. Full recomputation leaves out what has no backward pass, and counts
    its layers from the first trainable one.

    Upstream checkpoints the frozen layers too, and gives no gradient to any layer of a range whose input does not
    require grad; it also fails where the layers of a uniform division do not divide.
    """

    num_layers_below: int = 0

    def _checkpointed_forward(self, hidden_states: torch.Tensor, **arguments: object) -> torch.Tensor:
        """hidden_states [s, b, h] → the same shape. The other arguments go to every layer as they are."""
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
