"""Layers on pipeline stages: counts per stage, megatron.core's layout, and a drawing. Pure functions.

A list of counts is in megatron.core's virtual-stage-major order: chunk 0 of every stage, then chunk 1, ….
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_llamapro.config.schema import ParallelConfig


def even_stage_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the number of layers on each (virtual) stage, as even as possible, the longer stages first."""
    each, rest = divmod(num_layers, num_stages)
    return tuple(each + (stage < rest) for stage in range(num_stages))


def stage_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Return the number of layers on each (virtual) stage: as configured, else as even as possible."""
    if parallel.pipeline_stage_layers is not None:
        return tuple(parallel.pipeline_stage_layers)
    num_stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    return even_stage_layers(num_layers, num_stages)


def to_megatron_layout(counts: Sequence[int]) -> list[list[str]]:
    """Return megatron.core's `pipeline_model_parallel_layout`: the embedding first, the loss last."""
    layout = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def draw(counts: Sequence[int], added_layers: Collection[int], *, num_stages: int | None = None) -> str:
    """Draw one line: `stage 0 │ E o o A │ 1 │ o o A H`: A added block, o original, E embedding, H head.
    If there are more counts than `num_stages`, they are virtual stages and stage numbers repeat: `… │ 0 │ …`."""
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
