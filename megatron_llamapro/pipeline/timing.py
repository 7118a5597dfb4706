"""Seconds of every block of a model on one rank: from its FLOPs, or from what a short run measured."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_llamapro.config.errors import PipelinePlanError
from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.pipeline.cost import Trains, Work, head_work, layer_work
from megatron_llamapro.pipeline.job import ModelTime
from megatron_llamapro.pipeline.memory import Division
from megatron_llamapro.pipeline.simulate import ChunkTime

# What a calibration measures, in seconds a micro-batch.
KINDS = ("below", "frozen", "trainable", "head", "embedding")


def time_from_flops(shape: ModelShape, trains: Trains, division: Division, *, flops_per_second: float) -> ModelTime:
    """`flops_per_second` is what a rank really reaches: its peak, times the share of it that the work gets."""

    def of(work: Work) -> ChunkTime:
        scale = division.tokens / division.tensor_size / flops_per_second
        return ChunkTime(work.forward * scale, (work.input_gradient + work.weight_gradient) * scale)

    layers = tuple(
        of(layer_work(shape, layer, seq_length=division.seq_length, trains=trains)) for layer in range(shape.num_layers)
    )
    return ModelTime(layers, ChunkTime(0.0, 0.0), of(head_work(shape, trains=trains)))


def kind_of(layer: int, shape: ModelShape, trains: Trains) -> str:
    """Which of `KINDS` a layer is."""
    if layer in trains.layers:
        return "trainable"
    return "frozen" if layer >= trains.first_layer(shape.num_layers) else "below"


def time_from_calibration(shape: ModelShape, trains: Trains, measured: Mapping[str, object]) -> ModelTime:
    """`measured` as `training.calibration` writes it: forward and backward seconds of each kind.

    Raises:
        PipelinePlanError: a figure is missing, or is none.
    """
    times = {}
    for kind in KINDS:
        try:
            times[kind] = ChunkTime(float(measured[kind]["forward"]), float(measured[kind]["backward"]))  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise PipelinePlanError(
                f"the calibration has no forward and backward seconds of '{kind}': write it with --calibrate"
            ) from None
    layers = tuple(times[kind_of(layer, shape, trains)] for layer in range(shape.num_layers))
    return ModelTime(layers, times["embedding"], times["head"])
