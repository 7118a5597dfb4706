"""Bytes that a stage holds, by arithmetic: weights, gradients, optimizer state, activations in flight.

The activations are those of this project's layers (`model/`), which keep the minimum for their backward passes.
Recomputation skips layers without a backward pass, as `model/skip_frozen.py` does. Full recomputation counts layers
from the first one with a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_llamapro.config.schema import RecomputeConfig
from megatron_llamapro.expansion.trainable_part import TrainablePart, is_row_parallel, linears
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.flops import block_attention_flops, linear_flops

_FLOAT32 = 4  # bytes
GRADIENT, _MASTER, _MOMENTS = 4, 4, 8  # bytes per trainable parameter: float32, and two moments

KEEP_ALL = RecomputeConfig()


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
        """Tokens per micro-batch."""
        return self.micro_batch_size * self.seq_length


def block_parameters(shape: ModelShape) -> int:
    """Return the parameters of one block with its norms. Biases and query and key norms (thousandths) are left out."""
    return sum(linear.num_parameters for linear in linears(shape)) + 2 * shape.hidden_size


def state_bytes(parameters: float, trainable: float, division: Division) -> float:
    """Return one rank's bytes of weights, gradients, master weights (unless weights are float32) and moments. The
    counts are of all tensor-parallel ranks; optimizer state is sharded over the replicas."""
    state = _MOMENTS + (_MASTER if division.itemsize < 4 else 0)
    each = parameters * division.itemsize + trainable * (GRADIENT + state / division.data_size)
    return each / division.tensor_size


def block_activations(
    shape: ModelShape, division: Division, *, trains: TrainablePart, layer: int, recompute: RecomputeConfig = KEEP_ALL
) -> float:
    """Return the bytes that one block with a backward pass keeps per micro-batch, unless it is recomputed whole.

    It keeps the residual stream twice; joint queries, keys and values; attention's output and the logarithm of each
    row's sum; both halves of the feed-forward's first product; and two numbers per token for the norms. A trainable
    linear also keeps its input, and an adapter the tensor between its products. A recomputed part keeps only its input.
    """
    along = division.tensor_size if division.sequence_parallel else 1  # ranks that share the sequence
    hidden, heads = shape.hidden_size / along, shape.num_attention_heads / division.tensor_size
    query, key_value = heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels / division.tensor_size
    feed_forward = shape.ffn_hidden_size / division.tensor_size * (shape.moe_router_topk or 1)

    def extra(linear: str, its_input: float) -> float:
        """Return what a linear keeps for the gradients of its own weight and of its adapter."""
        if trains.adapters is None or not trains.has_adapter(layer, linear):
            return its_input if trains.trains_weight(layer, linear) else 0.0
        return its_input + trains.adapters.rank / (along if is_row_parallel(linear) else 1)

    modules = frozenset(recompute.modules)
    kept = 2 * hidden + query + 2 * key_value + extra("linear_qkv", hidden)
    if "core_attn" in modules:
        kept += extra("linear_proj", query)
    else:
        kept += query + extra("linear_proj", 0) + heads * _FLOAT32 / division.itemsize
    if modules & {"mlp", "moe"}:
        kept += hidden
    else:
        kept += 2 * feed_forward + extra("linear_fc1", hidden) + extra("linear_fc2", feed_forward)
    norms = 2 / along * _FLOAT32
    return division.tokens * (kept * division.itemsize + norms)


@dataclass(frozen=True)
class ChunkBytes:
    """Bytes that one (virtual) stage holds."""

    state: float
    """Held always."""
    activations: float
    """Held per micro-batch between its forward and its backward pass."""
    recomputed: float
    """Held in addition during a backward pass."""
    trainable: float
    """Not bytes: the trainable parameters on all tensor-parallel ranks together."""


def chunk_bytes(
    shape: ModelShape,
    layers: Sequence[int],
    *,
    is_first: bool,
    is_last: bool,
    trains: TrainablePart,
    division: Division,
    recompute: RecomputeConfig = KEEP_ALL,
) -> ChunkBytes:
    """Return the bytes of a chunk of these layers, with the embedding if it is first and the head if it is last."""
    block, table = block_parameters(shape), shape.hidden_size * shape.vocab_size
    parameters = block * len(layers) + table * (is_first + is_last)
    trainable = sum(trains.trainable_parameters(shape, layer) for layer in layers)
    adapters = [trains.adapters.parameters(shape, layer, division.tensor_size) for layer in layers if trains.adapters]
    parameters, trainable = parameters + sum(adapters), trainable + sum(adapters)
    trainable += table * (is_first * trains.embedding + is_last * trains.output_layer)
    first = trains.first_layer(shape.num_layers)

    def activations(of: Iterable[int]) -> float:
        parts = (block_activations(shape, division, trains=trains, layer=each, recompute=recompute) for each in of)
        return sum(parts)

    hidden = division.tokens * shape.hidden_size * division.itemsize
    backward = [layer for layer in layers if layer >= first]
    groups = recomputed_groups(backward, recompute)
    whole = {layer for group in groups for layer in group}
    along = division.tensor_size if division.sequence_parallel else 1
    kept = activations(layer for layer in backward if layer not in whole) + len(groups) * hidden / along
    if is_last and first <= shape.num_layers:  # the final norm's input, and the loss's gradient by the hidden states
        kept += hidden / along + hidden
    again = max(map(activations, groups), default=0.0)
    return ChunkBytes(state_bytes(parameters, trainable, division), kept, again, trainable)


def recomputed_groups(layers: Sequence[int], recompute: RecomputeConfig) -> list[Sequence[int]]:
    """Return the layers that are recomputed whole, in groups that keep only their input. `layers` are those of a chunk
    that have a backward pass."""
    if recompute.granularity != "full":
        return []
    number = recompute.num_layers or 1
    if recompute.method == "block":
        return [[layer] for layer in layers[:number]]
    return [layers[start : start + number] for start in range(0, len(layers), number)]


def share_of_forward(
    shape: ModelShape, layer: int, recompute: RecomputeConfig, *, seq_length: int, trains: TrainablePart
) -> float:
    """Return the part of a layer's forward FLOPs that selective recomputation repeats."""
    if recompute.granularity != "selective":
        return 0.0
    attention = block_attention_flops(shape, seq_length, layer)
    parts = {each.name: linear_flops(each, layer, trains=trains) for each in linears(shape)}
    feed_forward = sum(flops for name, flops in parts.items() if name not in ("linear_qkv", "linear_proj"))
    again = {"core_attn": attention, "mlp": feed_forward, "moe": feed_forward}
    return sum(again[name] for name in set(recompute.modules)) / (attention + sum(parts.values()))
