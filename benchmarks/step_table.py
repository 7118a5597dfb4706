"""The measurements of benchmarks/train_step.py as a Markdown table, with the ratios that have a target."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_llamapro.expansion.trainable_part import TrainablePart
from megatron_llamapro.families.shape import ModelShape
from megatron_llamapro.planning.flops import step_work
from step_models import StepModel


@dataclass(frozen=True)
class Row:
    """One candidate."""

    title: str
    seconds: Sequence[float]
    """One step per round."""
    weight_bytes: int = 0
    peak_bytes: int = 0
    """Above the weights. Not measured for the floor."""


def model_shape(model: StepModel) -> ModelShape:
    """Return the expanded model's shape for the cost model."""
    config = model.config
    return ModelShape(
        num_layers=model.num_expanded_layers,
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=1e-5,
        max_position_embeddings=model.seq_length,
        rotary_base=10000.0,
        rope_scaling=None,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def flop_ratio(model: StepModel) -> float:
    """Return the work of a step that trains the added blocks, divided by that of a step that trains everything."""
    shape = model_shape(model)
    added = step_work(shape, seq_length=model.seq_length, trains=TrainablePart(frozenset(model.added_layers)))
    whole = TrainablePart(frozenset(range(shape.num_layers)), embedding=True, output_layer=True)
    everything = step_work(shape, seq_length=model.seq_length, trains=whole)
    return added.total / everything.total


def time_ratio(row: Row, other: Row) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(row.seconds, other.seconds, strict=True))


def markdown(model: StepModel, rows: Mapping[str, Row], machine: Mapping[str, str]) -> str:
    """Return the table and the ratios that have a target."""
    lines = [
        f"### {model.title}, vocabulary {model.config['vocab_size']}, {model.batch_size} × {model.seq_length} tokens, "
        "float32",
        "",
        "| | seconds a step | × transformers | × floor | weights, MB | peak above them, MB |",
        "|---|---|---|---|---|---|",
        *(_row(row, rows) for row in rows.values()),
        "",
        *(f"- {line}" for line in _ratios(model, rows)),
        *(f"- {what}: {value}" for what, value in machine.items()),
    ]
    return "\n".join(lines)


def _row(row: Row, rows: Mapping[str, Row]) -> str:
    seconds = f"{statistics.median(row.seconds):.3f} ({min(row.seconds):.3f}–{max(row.seconds):.3f})"
    memory = f"{row.weight_bytes / 1e6:.0f} | {row.peak_bytes / 1e6:.0f}" if row.peak_bytes else "– | –"
    return (
        f"| {row.title} | {seconds} | {time_ratio(row, rows['transformers']):.3f} | "
        f"{time_ratio(row, rows['floor']):.3f} | {memory} |"
    )


def _ratios(model: StepModel, rows: Mapping[str, Row]) -> list[str]:
    ours, everything, theirs = rows["ours"], rows["ours_everything"], rows["transformers"]
    work, time = flop_ratio(model), time_ratio(ours, everything)
    return [
        f"peak memory above the weights, ours / transformers: {ours.peak_bytes / theirs.peak_bytes:.3f}; with them: "
        f"{(ours.peak_bytes + ours.weight_bytes) / (theirs.peak_bytes + theirs.weight_bytes):.3f}",
        f"added blocks / everything: {time:.3f} of the time for {work:.3f} of the FLOP: {time / work:.3f} ×",
    ]
