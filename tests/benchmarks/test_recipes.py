"""Every recipe runs dry at its full world size, and says in its head what that found."""

from __future__ import annotations

import pytest

from megatron_llamapro.testing.distributed import run_apart
from recipes import HF_CONFIGS, RECIPES, ROOT, Recipe, figures


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name} on {recipe.num_gpus}")
def test_the_head_says_what_was_counted(recipe: Recipe) -> None:
    assert f"#   {run_apart(figures, recipe)}\n" in recipe.path.read_text()


def test_no_recipe_is_left_out() -> None:
    assert {path.parent.name for path in ROOT.glob("examples/*_pro*/run.yaml")} == set(HF_CONFIGS)
