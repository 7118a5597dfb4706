"""What recomputation changes for a (virtual) stage: forward work that is done again, and activations that are not kept.

As `model/skip_frozen.py` does it: layers without a backward pass are left out, and full recomputation counts from the
first layer that has one.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llamapro.config.schema import RecomputeConfig
from megatron_llamapro.expansion.trains import Trains, linears
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.flops import block_attention_flops, linear_flops

KEEP_ALL = RecomputeConfig()


def recomputed_groups(layers: Sequence[int], recompute: RecomputeConfig) -> list[Sequence[int]]:
    """Of a chunk's `layers` that have a backward pass: those recomputed whole, in groups of which only the input is
    kept."""
    if recompute.granularity != "full":
        return []
    number = recompute.num_layers or 1
    if recompute.method == "block":
        return [[layer] for layer in layers[:number]]
    return [layers[start : start + number] for start in range(0, len(layers), number)]


def share_of_forward(
    shape: ModelShape, layer: int, recompute: RecomputeConfig, *, seq_length: int, trains: Trains
) -> float:
    """Part of a layer's forward pass that selective recomputation does again, by FLOPs."""
    if recompute.granularity != "selective":
        return 0.0
    attention = block_attention_flops(shape, seq_length, layer)
    parts = {each.name: linear_flops(each, layer, trains=trains) for each in linears(shape)}
    feed_forward = sum(flops for name, flops in parts.items() if name not in ("linear_qkv", "linear_proj"))
    again = {"core_attn": attention, "mlp": feed_forward, "moe": feed_forward}
    return sum(again[name] for name in set(recompute.modules)) / (attention + sum(parts.values()))
