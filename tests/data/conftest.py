"""Fixtures of the data tests: a tiny tokenizer, and text as jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megatron_llamapro.testing.tiny_models import write_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [text[:3000] for text in sorted(topics.values())]


@pytest.fixture(scope="session")
def jsonl(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def pair(jsonl: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a preprocessed pair; do not change it."""
    from megatron_llamapro.data.preprocess import preprocess

    prefix = tmp_path_factory.mktemp("pair") / "text"
    preprocess([jsonl], prefix, tokenizer=tokenizer_folder)
    return prefix


@pytest.fixture
def copied_pair(pair: Path, tmp_path: Path) -> Path:
    """Return the prefix of a copied pair that a test may damage."""
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"copy{ending}").write_bytes(Path(f"{pair}{ending}").read_bytes())
    return tmp_path / "copy"
