"""What several rooms' tests share: tiny models, each made once in a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_model` with its folder chosen: the same arguments give the same folder, which must not be changed."""
    from megatron_llamapro.testing.tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def make(**settings: object) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny_model`, where the test is about a LLaMA."""
    return tiny_model
