"""The floor of a training step: its matrix products and SDPA calls in the step's order and shapes, with nothing in
between. Trainable blocks, and blocks without an input gradient, count as in planning/flops.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_models import StepModel


@dataclass
class Linear:
    """y = x W^T, its input gradient and its weight gradient, on random values."""

    weight: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor

    def forward(self) -> None:
        torch.mm(self.x, self.weight.t())

    def input_gradient(self) -> None:
        torch.mm(self.dy, self.weight)

    def weight_gradient(self) -> None:
        torch.mm(self.dy.t(), self.x)


class Floor:
    """All products of one step. Each block has its own weights, as in a model, so that none stays in a cache."""

    def __init__(self, model: StepModel) -> None:
        config = model.config
        hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        head_size = hidden // heads
        tokens = model.batch_size * model.seq_length
        self._values: dict[int, torch.Tensor] = {}
        self._tokens = tokens
        sizes = {
            "qkv": (hidden + 2 * groups * head_size, hidden),
            "proj": (hidden, hidden),
            "fc1": (2 * feed_forward, hidden),
            "fc2": (hidden, feed_forward),
        }
        self.blocks = [
            {name: self._linear(*size) for name, size in sizes.items()} for _ in range(model.num_expanded_layers)
        ]
        self.head = self._linear(config["vocab_size"], hidden)
        self.added_layers = model.added_layers
        shape = (model.batch_size, model.seq_length)
        # [b, s, heads, d] in memory, like the output of a product
        self.query, self.key, self.value = (
            torch.randn(*shape, number, head_size).transpose(1, 2).requires_grad_()
            for number in (heads, groups, groups)
        )
        self.context_gradient = torch.randn(*shape, heads, head_size).transpose(1, 2)

    def _linear(self, outputs: int, inputs: int) -> Linear:
        return Linear(torch.randn(outputs, inputs) * 0.02, self._activation(inputs), self._activation(outputs))

    def _activation(self, width: int) -> torch.Tensor:
        if width not in self._values:
            self._values[width] = torch.randn(self._tokens, width)
        return self._values[width]

    @property
    def weight_bytes(self) -> int:
        return sum(linear.weight.numel() * 4 for linear in self._linears())

    def _linears(self) -> Iterable[Linear]:
        yield from (linear for block in self.blocks for linear in block.values())
        yield self.head

    def run(self) -> None:
        """Run all products of one step."""
        first = min(self.added_layers)
        graphs = []
        for layer, block in enumerate(self.blocks):
            block["qkv"].forward()
            graphs.append(self._attend(with_graph=layer >= first))
            block["proj"].forward()
            block["fc1"].forward()
            block["fc2"].forward()
        self.head.forward()
        self.head.input_gradient()
        for layer in range(len(self.blocks) - 1, first - 1, -1):
            block, trains = self.blocks[layer], layer in self.added_layers
            for name in ("fc2", "fc1", "proj"):
                block[name].input_gradient()
                if trains:
                    block[name].weight_gradient()
            torch.autograd.grad(graphs.pop(), (self.query, self.key, self.value), self.context_gradient)
            block["qkv"].input_gradient()
            if trains:
                block["qkv"].weight_gradient()

    def _attend(self, *, with_graph: bool) -> torch.Tensor:
        with torch.set_grad_enabled(with_graph):
            return scaled_dot_product_attention(
                self.query, self.key, self.value, is_causal=True, enable_gqa=self.query.shape[1] != self.key.shape[1]
            )
