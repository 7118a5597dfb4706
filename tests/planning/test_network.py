"""Seconds of messages, depending on the nodes of the ranks."""

from __future__ import annotations

import pytest

from megatron_llamapro.planning.memory import Division
from megatron_llamapro.planning.network import Network, replicas_time

NETWORK = Network(ranks_per_node=8, within_node=8.0, between_nodes=1.0)


@pytest.mark.parametrize(
    ("size", "stride", "seconds"),
    [
        (1, 1, 0.0),
        (8, 1, 7 / 8),  # one node
        (4, 2, 6 / 8),  # every second rank of a node
        (16, 1, 7.5 / 8),  # two nodes; their eight adapters together are as fast as links within a node
        (4, 4, 6 / 2),  # two ranks of each node
        (4, 8, 6.0),  # one rank of each node
        (4, 16, 6.0),
        (12, 1, 8 * 11 / 12 / 4),  # four ranks of its second half are alone on a node
        (3, 1, 8 * 2 / 3),  # the third group spans two nodes, with one rank alone on one
    ],
)
def test_collectives_take_the_time_of_their_slowest_link(size: int, stride: int, seconds: float) -> None:
    assert NETWORK.collective(8.0, size=size, stride=stride) == pytest.approx(seconds)


def test_messages_between_nodes_are_slower() -> None:
    assert NETWORK.message(8.0, stride=4) == 1.0 and NETWORK.message(8.0, stride=8) == 8.0


def test_replicas_gather_parameters_and_reduce_gradients() -> None:
    """Parameters in bfloat16, gradients in float32."""
    time = replicas_time(8.0, Division(tensor_size=4, data_size=2), NETWORK)
    assert (time.forward, time.backward) == (1.0, 2.0)
    assert replicas_time(8.0, Division(tensor_size=4, data_size=1), NETWORK).total == 0.0
