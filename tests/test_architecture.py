"""Imports point one way: tools and the front door see everything, configuration sees nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path("megatron_llamapro")

# Which rooms a room may import. Some pure modules count as rooms of their own.
ALLOWED = {
    "config": set(),
    "expansion": {"config"},
    "model.refused": set(),
    "model.shape": set(),
    "model.hf_fields": {"config", "model.shape"},
    "model.rope_fields": {"config", "model.hf_fields", "model.shape"},
    "model.families": {
        "config",
        "expansion",
        "model.hf_fields",
        "model.refused",
        "model.rope_fields",
        "model.shape",
    },
    "model.rotary": {"model.shape"},
    "model.trainable": {"config", "expansion", "model.shape", "pipeline.cost"},
    "pipeline.cost": {"model.shape"},
    "pipeline": {"config", "model.shape", "pipeline.cost"},
    "checkpoint": {
        "config",
        "expansion",
        "model.families",
        "model.hf_fields",
        "model.rotary",
        "model.shape",
        "pipeline",
    },
    "launch": {"config"},
    "runtime.console": set(),
    "runtime.stop": {"config"},
    "runtime.launched": {"config"},
    "runtime.upstream": set(),
    "runtime": {"config", "runtime.launched", "runtime.stop"},
    "model": {"config", "expansion", "model.rotary", "model.shape", "model.trainable", "pipeline", "pipeline.cost"},
    "optimizer": {"config", "model"},
    "data.text_files": {"config"},
    "data.tokenizer": {"config"},
    "data.inputs": {"config", "data.text_files", "data.tokenizer"},
    "data.token_files": {"config", "data.inputs"},
    "data": {
        "config",
        "checkpoint",
        "data.text_files",
        "data.tokenizer",
        "data.inputs",
        "data.token_files",
        "runtime",
        "runtime.stop",
        "runtime.upstream",
    },
    "planning": {
        "config",
        "expansion",
        "model.shape",
        "model.trainable",
        "pipeline.cost",
        "pipeline",
        "checkpoint",
    },
    "training.kept": {"config", "checkpoint"},
    "training.start": {
        "config",
        "model.families",
        "model.shape",
        "checkpoint",
        "planning",
        "data.token_files",
        "data.tokenizer",
    },
    "training": {
        "config",
        "expansion",
        "model.families",
        "model.shape",
        "model.trainable",
        "pipeline.cost",
        "pipeline",
        "checkpoint",
        "planning",
        "runtime",
        "runtime.stop",
        "runtime.upstream",
        "model",
        "optimizer",
        "data",
        "data.tokenizer",
        "training.kept",
        "training.start",
    },
    "testing": {
        "config",
        "model.families",
        "model.rotary",
        "model.shape",
        "checkpoint",
        "runtime",
        "runtime.upstream",
        "training",
    },
    "pretrain": {
        "config",
        "runtime",
        "runtime.console",
        "runtime.launched",
        "runtime.stop",
        "runtime.upstream",
        "training",
        "training.kept",
        "training.start",
    },
}
WITHOUT_TORCH = (
    "config",
    "expansion",
    "launch",
    "model.refused",
    "model.shape",
    "model.hf_fields",
    "model.rope_fields",
    "model.families",
    "model.trainable",
    "pipeline",
    "pipeline.cost",
    "runtime.console",
    "runtime.stop",
    "runtime.launched",
    "runtime.upstream",
    "data.tokenizer",
    "training.kept",
    "training.start",
)
WITHOUT_MEGATRON = (*WITHOUT_TORCH, "model.rotary", "checkpoint", "planning")


def room_of(module: str) -> str:
    """megatron_llamapro.model.families → model.families; megatron_llamapro.model.build → model."""
    parts = module.split(".")[1:]
    return next((room for room in (".".join(parts[:2]), parts[0]) if room in ALLOWED), parts[0])


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(".".join(path.with_suffix("").parts))
    imported = set(imports_of(path))
    assert not any(name.startswith("megatron.training") for name in imported)
    rooms = {room_of(name) for name in imported if name.startswith("megatron_llamapro.")} - {room}
    assert rooms <= ALLOWED[room]
    roots = {name.split(".")[0] for name in imported}
    assert not (room in WITHOUT_TORCH and "torch" in roots)
    assert not (room in WITHOUT_MEGATRON and "megatron" in roots)


def test_files_stay_small() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
    tools = {str(path): len(path.read_text().splitlines()) for path in Path("tools").glob("*.py")}
    assert {path: length for path, length in tools.items() if length > 60} == {}
