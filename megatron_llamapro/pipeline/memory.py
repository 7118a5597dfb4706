"""Bytes that a stage holds, by arithmetic: weights, gradients, optimizer state, activations of what is in flight.

The activations are those of this project's layers (`model/`), which keep the least that their backward passes need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.pipeline.cost import Trains, linears

_GRADIENT, _MASTER, _MOMENTS = 4, 4, 8  # bytes a trainable parameter: float32, and two moments


@dataclass(frozen=True)
class Division:
    """How a model and a batch are divided, without the pipeline."""

    tensor_size: int = 1
    data_size: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    seq_length: int = 4096
    itemsize: int = 2
    """Bytes of a weight and of an activation: 2 in bfloat16, 4 in float32."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * self.seq_length


def block_parameters(shape: ModelShape) -> int:
    """Of one block, with its norms; biases and norms of queries and keys are left out (thousandths)."""
    return sum(linear.num_parameters for linear in linears(shape)) + 2 * shape.hidden_size


def state_bytes(parameters: float, trainable: float, division: Division) -> float:
    """Weights, gradients, master weights (of a type below float32) and moments of so many parameters of the whole
    model's, on one rank; optimizer state is divided over the replicas."""
    state = _MOMENTS + (_MASTER if division.itemsize < 4 else 0)
    each = parameters * division.itemsize + trainable * (_GRADIENT + state / division.data_size)
    return each / division.tensor_size


def block_activations(shape: ModelShape, division: Division, *, trains: Trains, layer: int) -> float:
    """Bytes that one block with a backward pass keeps of a micro-batch.

    Residual stream twice, joint queries, keys and values, attention's output with the logarithm of each row's sum,
    both halves of the feed-forward's first product; two numbers for the norms. What trains also keeps the inputs of
    its linears, and an adapter what lies between its two products.
    """
    hidden = shape.hidden_size / (division.tensor_size if division.sequence_parallel else 1)
    query = shape.num_attention_heads * shape.kv_channels / division.tensor_size
    key_value = shape.num_query_groups * shape.kv_channels / division.tensor_size
    feed_forward = shape.ffn_hidden_size / division.tensor_size * (shape.moe_router_topk or 1)
    kept = 2 * hidden + query + 2 * key_value + query + 2 * feed_forward
    inputs = {"linear_qkv": hidden, "linear_fc1": hidden, "linear_fc2": feed_forward}
    for linear in linears(shape):
        has_adapter = trains.has_adapter(layer, linear.name)
        if has_adapter or trains.trains_weight(layer, linear.name):
            kept += inputs.get(linear.name, 0)
        if has_adapter and trains.adapters:
            is_divided = linear.is_row_parallel and division.sequence_parallel
            kept += trains.adapters.rank / (division.tensor_size if is_divided else 1)
    float32 = shape.num_attention_heads / division.tensor_size + 2 / (
        division.tensor_size if division.sequence_parallel else 1
    )
    return division.tokens * (kept * division.itemsize + 4 * float32)


@dataclass(frozen=True)
class ChunkBytes:
    """What one (virtual) stage holds."""

    state: float
    """Always."""
    activations: float
    """Of every micro-batch between its forward and its backward pass."""


def chunk_bytes(
    shape: ModelShape, layers: Sequence[int], *, is_first: bool, is_last: bool, trains: Trains, division: Division
) -> ChunkBytes:
    """Bytes of the chunk of these layers, with the embedding where it is the first, the head where it is the last."""
    block, table = block_parameters(shape), shape.hidden_size * shape.vocab_size
    parameters = block * len(layers) + table * (is_first + is_last)
    trainable = sum(trains.trainable_parameters(shape, layer) for layer in layers)
    adapters = [trains.adapters.parameters(shape, layer, division.tensor_size) for layer in layers if trains.adapters]
    parameters, trainable = parameters + sum(adapters), trainable + sum(adapters)
    trainable += table * (is_first * trains.embedding + is_last * trains.output_layer)
    first = trains.first_layer(shape.num_layers)
    kept = sum(block_activations(shape, division, trains=trains, layer=layer) for layer in layers if layer >= first)
    if is_last and first <= shape.num_layers:  # the final norm's input, and the loss's gradient by the hidden states
        kept += 2 * division.tokens * shape.hidden_size * division.itemsize
    return ChunkBytes(state_bytes(parameters, trainable, division), kept)
