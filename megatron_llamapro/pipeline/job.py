"""What is to be laid out over pipeline stages, and what each run of its layers costs on one of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llamapro.config.schema import RecomputeConfig
from megatron_llamapro.model.shape import ModelShape
from megatron_llamapro.pipeline.cost import Trains
from megatron_llamapro.pipeline.memory import ChunkBytes, Division, chunk_bytes
from megatron_llamapro.pipeline.recompute import KEEP_ALL, recomputed_groups, share_of_forward
from megatron_llamapro.pipeline.simulate import ChunkTime


@dataclass(frozen=True)
class ModelTime:
    """Seconds of one micro-batch on one rank, part by part, without recomputation."""

    layers: tuple[ChunkTime, ...]
    embedding: ChunkTime
    head: ChunkTime

    def __add__(self, other: ModelTime) -> ModelTime:
        """Part by part, one after the other."""
        layers = tuple(mine + its for mine, its in zip(self.layers, other.layers, strict=True))
        return ModelTime(layers, self.embedding + other.embedding, self.head + other.head)


@dataclass(frozen=True)
class Chunk:
    """Layers on one (virtual) stage."""

    time: ChunkTime
    held: ChunkBytes


@dataclass(frozen=True)
class Job:
    """What is to be laid out."""

    shape: ModelShape
    trains: Trains
    division: Division
    time: ModelTime
    num_stages: int
    num_chunks: int
    """Virtual stages a stage; 1: none."""
    num_microbatches: int
    memory_bytes: float = float("inf")
    message: float = 0.0
    """Seconds of a message between stages."""
    recompute: RecomputeConfig = KEEP_ALL

    @property
    def num_positions(self) -> int:
        """Stages and virtual stages, in the order of the layers."""
        return self.num_stages * self.num_chunks

    def chunks(self, counts: Sequence[int]) -> tuple[Chunk, ...]:
        """What every position does and holds under a split."""
        starts = [sum(counts[:position]) for position in range(len(counts))]
        return tuple(self.chunk(position, start, counts[position]) for position, start in enumerate(starts))

    def chunk(self, position: int, first: int, count: int) -> Chunk:
        """`count` layers from `first` on, at a position: the embedding is at the first one, the head at the last."""
        is_first, is_last = position == 0, position == self.num_positions - 1
        key = (first, count, is_first, is_last)
        if key not in self._known:
            layers = range(first, first + count)
            held = chunk_bytes(
                self.shape,
                layers,
                is_first=is_first,
                is_last=is_last,
                trains=self.trains,
                division=self.division,
                recompute=self.recompute,
            )
            self._known[key] = Chunk(self._time(layers, is_first=is_first, is_last=is_last), held)
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[tuple[int, int, bool, bool], Chunk]:
        """A search asks for the same few hundred chunks millions of times."""
        return {}

    def _time(self, layers: range, *, is_first: bool, is_last: bool) -> ChunkTime:
        parts = [self.time.layers[layer] for layer in layers]
        parts += [self.time.embedding] * is_first + [self.time.head] * is_last
        backward = [layer for layer in layers if layer >= self.trains.first_layer(self.shape.num_layers)]
        whole = {layer for group in recomputed_groups(backward, self.recompute) for layer in group}
        again = sum(
            self.time.layers[layer].forward * (1.0 if layer in whole else self._share_again(layer))
            for layer in backward
        )
        return ChunkTime(sum(part.forward for part in parts), sum(part.backward for part in parts) + again)

    def _share_again(self, layer: int) -> float:
        seq_length = self.division.seq_length
        return share_of_forward(self.shape, layer, self.recompute, seq_length=seq_length, trains=self.trains)
