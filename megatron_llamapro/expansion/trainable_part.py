"""The trainable part of a model, for estimates of its cost: a block's linears and which of them train. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_llamapro.families.shape import ModelShape


@dataclass(frozen=True)
class Linear:
    """The matrix, or the experts' matrices, of one linear of a block."""

    name: str
    num_inputs: int
    num_outputs: int
    num_matrices: int = 1
    """Number of experts, or 1."""
    num_used: int = 1
    """The number of matrices that a token uses."""

    @property
    def num_parameters(self) -> int:
        """Parameters of all its matrices."""
        return self.num_inputs * self.num_outputs * self.num_matrices

    @property
    def forward_flops(self) -> float:
        """FLOPs of the forward pass per token."""
        return 2.0 * self.num_inputs * self.num_outputs * self.num_used


# The order of a block's parts in its forward pass. A backward pass ends at the first part that trains.
_POSITIONS = {
    "input_layernorm": 0,
    "linear_qkv": 1,
    "q_layernorm": 2,
    "k_layernorm": 2,
    "attention": 3,
    "linear_proj": 4,
    "pre_mlp_layernorm": 5,
    "router": 6,
    "experts": 7,
    "linear_fc1": 7,
    "linear_fc2": 8,
}


WHOLE = frozenset(_POSITIONS)
"""All parts of a block."""


def linears(shape: ModelShape) -> Iterator[Linear]:
    """Yield the linears of one block, in the order of the forward pass."""
    query = shape.num_attention_heads * shape.kv_channels
    key_value = shape.num_query_groups * shape.kv_channels
    hidden, experts = shape.hidden_size, {}
    if shape.num_moe_experts is not None:
        experts = {"num_matrices": shape.num_moe_experts, "num_used": shape.moe_router_topk or 1}
    yield Linear("linear_qkv", hidden, query + 2 * key_value)
    yield Linear("linear_proj", query, hidden)
    if shape.num_moe_experts is not None:
        yield Linear("router", hidden, shape.num_moe_experts)
    yield Linear("linear_fc1", hidden, 2 * shape.ffn_hidden_size, **experts)
    yield Linear("linear_fc2", shape.ffn_hidden_size, hidden, **experts)


def is_row_parallel(linear: str) -> bool:
    """Return whether tensor-parallel ranks divide a linear's inputs instead of its outputs."""
    return linear in ("linear_proj", "linear_fc2")


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters. All of them train."""

    layers: frozenset[int]
    rank: int
    targets: frozenset[str]
    """Names of linears."""

    def parameters(self, shape: ModelShape, layer: int, tensor_size: int = 1) -> int:
        """Return the parameters of one layer's adapters, summed over `tensor_size` tensor-parallel ranks.

        Each of these ranks has a copy of one of an adapter's two matrices.
        """
        here = [each for each in linears(shape) if layer in self.layers and each.name in self.targets]
        divided = sum(each.num_inputs if is_row_parallel(each.name) else each.num_outputs for each in here)
        copied = sum(each.num_outputs if is_row_parallel(each.name) else each.num_inputs for each in here)
        return self.rank * (divided + copied * tensor_size)


@dataclass(frozen=True)
class TrainablePart:
    """The trainable part of a model, for estimates of its cost."""

    layers: frozenset[int]
    """Layers in which anything trains."""
    embedding: bool = False
    output_layer: bool = False
    final_norm: bool = False
    parts: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """For layers that train only in part: the parts that train, without adapters."""
    adapters: Adapters | None = None

    def first_layer(self, num_layers: int) -> int:
        """Return the first layer that a backward pass must reach: -1 if the embedding trains, `num_layers` if no layer
        trains."""
        return -1 if self.embedding else min(self.layers, default=num_layers)

    def parts_of(self, layer: int) -> frozenset[str]:
        """Return the names of a layer's parts whose own weights train."""
        return self.parts.get(layer, WHOLE if layer in self.layers else frozenset())

    def trains_weight(self, layer: int, linear: str) -> bool:
        """Return whether the weights of one linear of a layer train."""
        parts = self.parts_of(layer)
        return linear in parts or ("experts" in parts and linear in ("linear_fc1", "linear_fc2"))

    def has_adapter(self, layer: int, linear: str) -> bool:
        """Return whether one linear of a layer has an adapter."""
        return self.adapters is not None and layer in self.adapters.layers and linear in self.adapters.targets

    def trainable_parameters(self, shape: ModelShape, layer: int) -> int:
        """Return the trainable parameters of one layer, without its adapters.

        Biases and norms of queries and keys are left out: they are thousandths of the total.
        """
        own = sum(each.num_parameters for each in linears(shape) if self.trains_weight(layer, each.name))
        return own + shape.hidden_size * len(self.parts_of(layer) & {"input_layernorm", "pre_mlp_layernorm"})

    def start(self, layer: int, num_layers: int) -> float:
        """Return where in a layer's forward pass a backward pass ends.

        That is -inf if any earlier layer (or the embedding) trains, and inf if neither this layer nor an earlier one
        does.
        """
        first = self.first_layer(num_layers)
        if layer != first:
            return float("-inf") if layer > first else float("inf")
        parts = set(self.parts_of(layer))
        if self.adapters is not None and layer in self.adapters.layers:
            parts |= self.adapters.targets
        return min(_POSITIONS[part] for part in parts)

    def is_reached(self, layer: int, part: str, num_layers: int) -> bool:
        """Return whether a backward pass continues through a part of a layer to the part's input."""
        return self.start(layer, num_layers) < _POSITIONS[part]
