"""Configurations read by the transformers of another interpreter, compared with our reading."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from config_cases import BASE
from config_difference import OurReading
from config_readings import VERSIONS, Case, Outcome, accepted_cases, outcome
from venvs import VENVS

ROOT = Path(__file__).parents[2]


def case(**fields: object) -> Case:
    config = {"model_type": "llama", **BASE, **fields}
    ours = OurReading.of(config)
    assert ours is not None
    return Case(config, ours, with_logits=True)


def test_the_outcome_counts_equal_failing_and_differing_models() -> None:
    good = case(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    fails = replace(good, config={**good.config, "rms_norm_eps": None})
    other = replace(good, config={**good.config, "rms_norm_eps": 0.5})
    found = outcome(Path(sys.executable), [good, good.exported, fails, other])
    assert found == Outcome(2, 1, 1, found.example)
    assert found.example.startswith("transformers fails: ")
    assert good.exported.config["rope_theta"] == 5e5 and "rope_theta" not in good.config


def test_the_cases_include_some_with_logits_and_some_without(capsys: pytest.CaptureFixture[str]) -> None:
    cases = accepted_cases(40, seed=0)
    assert {case.with_logits for case in cases} == {False, True}
    assert capsys.readouterr().out.startswith("11480 configurations, ")


def test_every_version_is_pinned_and_named_on_the_page() -> None:
    page = (ROOT / "docs" / "other_tools.md").read_text()
    for version in VERSIONS:
        if version in VENVS:
            assert f"| {VENVS[version].packages[0].removeprefix('transformers==')} |" in page
