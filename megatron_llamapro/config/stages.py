"""Layers on pipeline stages: counts per stage, megatron.core's layout of them, and a drawing. Pure functions.

A list of counts is in megatron.core's virtual-stage-major order: chunk 0 of every stage, then chunk 1, ….
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_llamapro.config.schema import ParallelConfig


def even_stage_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Counts of layers on each (virtual) stage, as even as they can be, the longer stages first."""
    each, rest = divmod(num_layers, num_stages)
    return tuple(each + (stage < rest) for stage in range(num_stages))


def stage_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Counts of layers on each (virtual) stage: the configured ones, else as even as they can be."""
    if parallel.pipeline_stage_layers is not None:
        return tuple(parallel.pipeline_stage_layers)
    num_stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    return even_stage_layers(num_layers, num_stages)


def to_megatron_layout(counts: Sequence[int]) -> list[list[str]]:
    """`pipeline_model_parallel_layout` of megatron.core: the embedding first, the loss last."""
    layout = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def draw(counts: Sequence[int], added_layers: Collection[int], *, num_stages: int | None = None) -> str:
    """One line: `stage 0 │ E o o A │ 1 │ o o A H`, added blocks as A, originals as o, embedding E, head H. With more
    counts than `num_stages` they are those of virtual stages, and every stage comes again: `… │ 0 │ …`."""
    parts: list[str] = []
    first = 0
    for position, count in enumerate(counts):
        letters = ["A" if layer in added_layers else "o" for layer in range(first, first + count)]
        if position == 0:
            letters.insert(0, "E")
        if position == len(counts) - 1:
            letters.append("H")
        parts.append(" ".join([f"{position % (num_stages or len(counts))} │", *letters]))
        first += count
    return "stage " + " │ ".join(parts)
