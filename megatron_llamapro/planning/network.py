"""Seconds that messages between ranks take, by arithmetic: bytes over bandwidth.

Ranks are numbered as in megatron.core: tensor-parallel ranks are neighbours, then replicas, then stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_llamapro.expansion.trainable_part import TrainablePart, is_row_parallel
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.job import ModelTime
from megatron_llamapro.planning.memory import GRADIENT, Division
from megatron_llamapro.planning.simulate import ChunkTime


@dataclass(frozen=True)
class Network:
    """Bandwidth between ranks, in bytes per second. A rank sends and receives at this rate at the same time."""

    ranks_per_node: int = 8
    within_node: float = 300e9
    """Two thirds of an H100's NVLink (450e9 in its data sheet)."""
    between_nodes: float = 40e9
    """Four fifths of a 400 Gbit/s adapter per GPU (50e9)."""

    def collective(self, num_bytes: float, *, size: int, stride: int = 1) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `num_bytes` in total over `size` ranks, `stride`
        apart.

        Over several nodes, the group's ranks on one node together receive the data of the other nodes, each through its
        own adapter (as NCCL's rings do). Groups are contiguous; if the size does not divide a node, some nodes hold
        fewer of its ranks.
        """
        if size == 1:
            return 0.0
        received = num_bytes * (size - 1) / size
        on_a_node = math.gcd(size, max(1, self.ranks_per_node // stride))
        if on_a_node == size:
            return received / self.within_node
        return received / min(self.within_node, self.between_nodes * on_a_node)

    def message(self, num_bytes: float, *, stride: int) -> float:
        """Return the seconds of a message to the rank `stride` further on."""
        return num_bytes / (self.within_node if stride < self.ranks_per_node else self.between_nodes)


def tensor_parallel_time(shape: ModelShape, trains: TrainablePart, division: Division, network: Network) -> ModelTime:
    """Return the seconds of the tensor-parallel collectives per micro-batch, with no overlap with computation.

    With sequence parallelism, a column-parallel linear gathers its input and scatters its input's gradient; a trainable
    one gathers its input once more. A row-parallel linear scatters its output and gathers its output's gradient.
    Without it, an all-reduce of twice the bytes replaces each scatter. Left out: the messages of adapters and of the
    loss (a few numbers per token).
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
    """Return the seconds per step in which replicas gather updated weights (forward) and reduce gradients (backward).

    Args:
        trainable: the number of trainable parameters of one rank.
    """

    def over_replicas(num_bytes: float) -> float:
        return network.collective(num_bytes, size=division.data_size, stride=division.tensor_size)

    return ChunkTime(over_replicas(trainable * division.itemsize), over_replicas(trainable * GRADIENT))
