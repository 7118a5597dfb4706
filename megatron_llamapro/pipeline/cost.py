"""Work that a step must do, by arithmetic: matrix products of every block, counted where frozen blocks need none.

An original block below the first trainable one is only run forward; one above it also needs its input gradient; what
trains also its weight gradient. A multiply-add is 2 FLOP; causal attention is counted once (half the square).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_llamapro.model.shape import ModelShape


@dataclass(frozen=True)
class Work:
    """FLOP a token."""

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


def block_matrix_flops(shape: ModelShape) -> float:
    """Forward FLOP a token of one block's weight matrices; of experts, those that the router chooses for it."""
    query = shape.num_attention_heads * shape.kv_channels
    key_value = shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (2 * query + 2 * key_value)
    feed_forward = 3 * shape.hidden_size * shape.ffn_hidden_size
    router = shape.hidden_size * (shape.num_moe_experts or 0)
    return 2.0 * (attention + router + (shape.moe_router_topk or 1) * feed_forward)


def block_attention_flops(shape: ModelShape, seq_length: int, layer: int = 0) -> float:
    """Forward FLOP a token of one block's causal attention: scores and their product with the values."""
    window = min(shape.window_of(layer) or seq_length, seq_length)
    keys = window - window**2 / (2 * seq_length)  # a token's, on average; the first tokens see fewer
    return 4.0 * keys * shape.num_attention_heads * shape.kv_channels


@dataclass(frozen=True)
class Trains:
    """What trains, as far as its cost goes."""

    layers: frozenset[int]
    embedding: bool = False
    output_layer: bool = False

    def first_layer(self, num_layers: int) -> int:
        """The first layer that a backward pass must reach: -1 with the embedding, `num_layers` without any layer."""
        return -1 if self.embedding else min(self.layers, default=num_layers)


def layer_work(shape: ModelShape, layer: int, *, seq_length: int, trains: Trains) -> Work:
    """FLOP a token of one block: below the first that trains forward only, above it the input gradient too, and where
    it trains the weight gradient."""
    matrices, attention = block_matrix_flops(shape), block_attention_flops(shape, seq_length, layer)
    has_backward = layer >= trains.first_layer(shape.num_layers)
    return Work(
        forward=matrices + attention,
        input_gradient=matrices + 2 * attention if has_backward else 0.0,
        weight_gradient=matrices if layer in trains.layers else 0.0,
    )


def head_work(shape: ModelShape, *, trains: Trains) -> Work:
    """FLOP a token of the output layer."""
    head = 2.0 * shape.hidden_size * shape.vocab_size
    has_backward = trains.first_layer(shape.num_layers) < shape.num_layers
    return Work(head, head if has_backward else 0.0, head if trains.output_layer else 0.0)


def step_work(
    shape: ModelShape,
    *,
    seq_length: int,
    trainable_layers: Collection[int],
    embedding_trains: bool = False,
    output_layer_trains: bool = False,
) -> Work:
    """FLOP a token of a training step of the whole model, with what trains as given."""
    trains = Trains(frozenset(trainable_layers), embedding_trains, output_layer_trains)
    layers = (layer_work(shape, layer, seq_length=seq_length, trains=trains) for layer in range(shape.num_layers))
    return sum(layers, start=head_work(shape, trains=trains))
