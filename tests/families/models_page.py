"""The tables of docs/models.md, from published configurations. `python tests/families/models_page.py` rewrites them."""

from __future__ import annotations

import math
import re
from pathlib import Path

from public_models import MODELS, REFUSED, PublicModel

from megatron_llamapro.checkpoint.tensors.weight_map import hf_shapes
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import model_shape
from megatron_llamapro.families.refusals import REFUSED as REASONS
from megatron_llamapro.families.shape import ModelShape

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
READ_HEAD = (
    "| models | type | layers | hidden | heads (groups) | feed-forward | vocabulary | RoPE | parameters |",
    "|---|---|---|---|---|---|---|---|---|",
)
REFUSED_HEAD = ("| models | type | why |", "|---|---|---|")


def tables() -> tuple[list[str], list[str]]:
    """Return the rows of the supported models, and those of the refused ones."""
    return [*READ_HEAD, *map(_row, MODELS)], [*REFUSED_HEAD, *(_refused_row(*row) for row in REFUSED)]


def _row(model: PublicModel) -> str:
    shape = model_shape(model.config)
    count = sum(math.prod(size) for size in hf_shapes(shape).values())
    cells = [
        model.names,
        f"`{model.config['model_type']}`",
        shape.num_layers,
        shape.hidden_size,
        f"{shape.num_attention_heads} ({shape.num_query_groups})",
        f"{shape.num_moe_experts} × {shape.ffn_hidden_size}" if shape.is_moe else shape.ffn_hidden_size,
        shape.vocab_size,
        _rope(shape),
        f"{count / 1e9:.3g} B" + (", tied" if shape.tie_word_embeddings else ""),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _rope(shape: ModelShape) -> str:
    scaling = shape.rope_scaling
    return f"{shape.rotary_base:,.0f}" + (f", {scaling.rope_type} × {scaling.factor:g}" if scaling else "")


def _refused_row(names: str, model_type: str, rope_type: str | None) -> str:
    scaling = {"rope_scaling": {"rope_type": rope_type, "factor": 4.0}} if rope_type else {}
    why = f"rotary embeddings of type {rope_type}" if rope_type else REASONS[model_type]
    try:
        model_shape({**MODELS[0].config, "model_type": model_type, **scaling})
    except CheckpointError as error:
        assert (rope_type or why) in str(error)
        return f"| {names} | `{model_type}` | {why} |"
    raise AssertionError(f"{names} is read")


def with_tables(page: str) -> str:
    """Return the page with recomputed tables."""
    for rows in tables():
        head = re.escape("\n".join(rows[:2]))
        page, count = re.subn(rf"^{head}\n(\|.*\n)*", lambda _, rows=rows: "\n".join(rows) + "\n", page, flags=re.M)
        assert count == 1, rows[0]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
