"""FLOPs that a step needs, by arithmetic: every block's matrix products, without those that frozen blocks skip.

An original block below the first trainable one only runs forward. A block above it also needs its input gradient. A
trainable weight also needs its weight gradient. A multiply-add is 2 FLOP; causal attention counts half the square.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llamapro.expansion.trainable_part import Linear, TrainablePart, linears
from megatron_llamapro.families.shape import ModelShape


@dataclass(frozen=True)
class Work:
    """FLOP per token."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: Work) -> Work:
        return Work(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )


def block_attention_flops(shape: ModelShape, seq_length: int, layer: int = 0) -> float:
    """Return forward FLOP per token of one block's causal attention: scores and their product with the values."""
    window = min(shape.window_of(layer) or seq_length, seq_length)
    keys = window - window**2 / (2 * seq_length)  # per token on average; the first tokens see fewer
    return 4.0 * keys * shape.num_attention_heads * shape.kv_channels


def linear_flops(linear: Linear, layer: int, *, trains: TrainablePart) -> float:
    """Return forward FLOP per token of one layer's linear, with its adapter."""
    rank = trains.adapters.rank if trains.adapters and trains.has_adapter(layer, linear.name) else 0
    return linear.forward_flops + 2.0 * rank * (linear.num_inputs + linear.num_outputs)


def layer_work(shape: ModelShape, layer: int, *, seq_length: int, trains: TrainablePart) -> Work:
    """Return FLOP per token of one block. Below the first trainable block it is forward only; above it the input
    gradient is added, and for trainable weights the weight gradient."""
    attention = block_attention_flops(shape, seq_length, layer)
    work = Work(attention, 2 * attention if trains.is_reached(layer, "attention", shape.num_layers) else 0.0, 0.0)
    for linear in linears(shape):
        flops, is_reached = linear.forward_flops, trains.is_reached(layer, linear.name, shape.num_layers)
        trains_itself = trains.trains_weight(layer, linear.name)
        # megatron.core computes no weight gradient without the input gradient.
        work += Work(flops, flops if is_reached or trains_itself else 0.0, flops if trains_itself else 0.0)
        if trains.has_adapter(layer, linear.name):
            work += _adapter_work(linear, trains.adapters.rank, is_reached=is_reached)
    return work


def _adapter_work(linear: Linear, rank: int, *, is_reached: bool) -> Work:
    down, up = 2.0 * rank * linear.num_inputs, 2.0 * rank * linear.num_outputs
    return Work(down + up, up + (down if is_reached else 0.0), down + up)


def head_work(shape: ModelShape, *, trains: TrainablePart) -> Work:
    """Return FLOP per token of the output layer."""
    head = 2.0 * shape.hidden_size * shape.vocab_size
    has_backward = trains.final_norm or trains.first_layer(shape.num_layers) < shape.num_layers
    return Work(head, head if has_backward else 0.0, head if trains.output_layer else 0.0)


def step_work(shape: ModelShape, *, seq_length: int, trains: TrainablePart) -> Work:
    """Return FLOP per token of the whole model in a training step."""
    layers = (layer_work(shape, layer, seq_length=seq_length, trains=trains) for layer in range(shape.num_layers))
    return sum(layers, start=head_work(shape, trains=trains))
