"""Fixtures of the checkpoint tests: copies of tiny models to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def damaged(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy a tiny model for a test to damage: `damaged(config={...})` changes fields of config.json."""

    def copy(*, config: dict | None = None, **settings: object) -> Path:
        folder = shutil.copytree(tiny_llama(**settings), tmp_path / "damaged")
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return copy
