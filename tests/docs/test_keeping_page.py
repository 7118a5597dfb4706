"""docs/keeping.md: its configurations, given after a run's own file as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import blocks

from megatron_llamapro.config.checks import check_run_config
from megatron_llamapro.config.io import parse_run_config

PAGE = "docs/keeping.md"
RECIPE = "examples/llama2_7b_pro/run.yaml"


@pytest.mark.parametrize("number", range(len(blocks(PAGE, "yaml"))))
def test_the_pages_configurations_are_valid(number: int, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(blocks(PAGE, "yaml")[number])
    check_run_config(parse_run_config(["--config", RECIPE, "--config", str(tmp_path / "page.yaml")]))


def test_known_sources_are_marked(tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(blocks(PAGE, "yaml")[1])
    config = parse_run_config(["--config", RECIPE, "--config", str(tmp_path / "page.yaml")])
    assert {entry.prefix: entry.known for entry in config.data.train} == {"corpus": False, "old": True}
    assert config.keep.penalty_on == "known"
