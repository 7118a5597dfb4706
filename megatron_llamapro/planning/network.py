"""Seconds that messages between ranks take, by arithmetic: bytes over bandwidth.

Ranks are numbered as megatron.core does: tensor-parallel ones are neighbours, then replicas, then stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_llamapro.expansion.trains import Trains, is_row_parallel
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.job import ModelTime
from megatron_llamapro.planning.memory import GRADIENT, Division
from megatron_llamapro.planning.simulate import ChunkTime


@dataclass(frozen=True)
class Network:
    """How fast ranks are joined. Bytes a second that a rank sends, and as many that it receives at the same time."""

    ranks_per_node: int = 8
    within_node: float = 300e9
    """Of an H100's NVLink, whose data sheet says 450e9, two thirds."""
    between_nodes: float = 40e9
    """Of a 400 Gbit/s adapter for each GPU, which is 50e9, four fifths."""

    def collective(self, num_bytes: float, *, size: int, stride: int = 1) -> float:
        """Seconds of an all-gather or a reduce-scatter of `num_bytes` in all over `size` ranks, `stride` apart.

        Over several nodes the ranks of a group on one node receive together what is on the others, each by an adapter
        of its own (as NCCL's rings do). Groups begin where the one before ends, so that one whose size does not divide
        a node's has few ranks on some nodes.
        """
        if size == 1:
            return 0.0
        received = num_bytes * (size - 1) / size
        on_a_node = math.gcd(size, max(1, self.ranks_per_node // stride))
        if on_a_node == size:
            return received / self.within_node
        return received / min(self.within_node, self.between_nodes * on_a_node)

    def message(self, num_bytes: float, *, stride: int) -> float:
        """Seconds of a message to the rank `stride` further on."""
        return num_bytes / (self.within_node if stride < self.ranks_per_node else self.between_nodes)


def tensor_parallel_time(shape: ModelShape, trains: Trains, division: Division, network: Network) -> ModelTime:
    """What the tensor-parallel ranks' collectives take of a micro-batch, none of it hidden behind work.

    With sequence parallelism a linear that is divided by columns gathers its input and scatters its input's gradient,
    one divided by rows scatters its output and gathers that one's gradient, and columns that train gather their input
    once more. Without it there is an all-reduce, of twice the bytes, where there is a scatter. Left out: what adapters
    send, and the loss (some numbers a token).
    """
    hidden = division.tokens * shape.hidden_size * division.itemsize
    one = network.collective(hidden, size=division.tensor_size)
    scatter, gather = (one, one) if division.sequence_parallel else (2 * one, 0.0)
    num_layers = shape.num_layers

    def backward(layer: int) -> float:
        seconds = 0.0
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            trains_itself, is_reached = trains.trains_weight(layer, name), trains.is_reached(layer, name, num_layers)
            if is_row_parallel(name):
                seconds += gather * (is_reached or trains_itself)
            else:
                seconds += scatter * (is_reached or trains_itself) + gather * trains_itself
        return seconds

    head_has_backward = trains.final_norm or trains.first_layer(num_layers) < num_layers
    return ModelTime(
        layers=tuple(ChunkTime(2 * (gather + scatter), backward(layer)) for layer in range(num_layers)),
        embedding=ChunkTime(scatter, gather * trains.embedding),
        head=ChunkTime(gather, scatter * head_has_backward),
    )


def replicas_time(trainable: float, division: Division, network: Network) -> ChunkTime:
    """Seconds a step in which replicas gather what was updated (forward) and reduce gradients (backward).

    Args:
        trainable: parameters of one rank that train.
    """

    def over_replicas(num_bytes: float) -> float:
        return network.collective(num_bytes, size=division.data_size, stride=division.tensor_size)

    return ChunkTime(over_replicas(trainable * division.itemsize), over_replicas(trainable * GRADIENT))
