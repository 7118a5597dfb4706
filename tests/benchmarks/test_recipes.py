"""Every recipe runs dry at its full world size, and its header states the figures found."""

from __future__ import annotations

import pytest

from megatron_llamapro.testing.distributed import run_apart
from recipes import HF_CONFIGS, RECIPES, ROOT, Recipe, figures


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name} on {recipe.num_gpus}")
def test_the_header_states_the_counted_figures(recipe: Recipe) -> None:
    assert f"#   {run_apart(figures, recipe)}\n" in recipe.path.read_text()


def test_every_recipe_is_covered() -> None:
    assert {path.parent.name for path in ROOT.glob("examples/*_pro*/run.yaml")} == set(HF_CONFIGS)
