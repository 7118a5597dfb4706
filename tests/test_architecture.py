"""Imports point one way, every room has one row, and fast commands start without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path("megatron_llamapro")
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]

# The rooms that each room may import, from the ground up.
ROOMS = {
    "config": "",
    "runtime": "config",
    "launch": "config",
    "families": "config",
    "expansion": "config families",
    "checkpoint": "config families expansion",
    "model": "config runtime families expansion",
    "planning": "config families expansion checkpoint",
    "data": "config runtime",
    "optimizer": "config runtime model",
    "training": "config runtime families expansion checkpoint model planning data optimizer",
    "evaluation": "config runtime families expansion checkpoint model data training",
    "dry_run": "config runtime checkpoint model planning training",
    "pretrain": "config runtime checkpoint training",
    "commands": "config runtime launch families expansion checkpoint planning data training evaluation dry_run",
    "testing": "config runtime families checkpoint training",
    "__main__": "config",  # and, by its table of names, the chosen command
}
# Rooms that know no ranks, and the only parts of runtime/ that they may import.
OF_RUNTIME = {"model": "upstream", "optimizer": "upstream"}
# The folders of checkpoint/ that each of its folders may import; "" is checkpoint/ itself.
CHECKPOINT_FOLDERS = {"tensors": "", "formats": "tensors", "": "tensors formats", "proof": "tensors formats "}

# Modules that commands import first, and modules that report errors before the slow imports.
WITHOUT_TORCH = (
    "config",
    "families",
    "expansion",
    "checkpoint",
    "launch",
    "planning",
    "commands",
    "pretrain",
    "__main__",
)
WITHOUT_TORCH_TOO = (
    "data.generate",
    "data.preprocess",
    "data.token_files",
    "data.tokenizer",
    "data.train_tokenizer",
    "evaluation.job",
    "evaluation.picture",
    "evaluation.ranking",
    "evaluation.results",
    "runtime.changes",
    "runtime.console",
    "runtime.launched",
    "runtime.lock",
    "runtime.stop",
    "runtime.upstream",
    "training.start",
)
WITH_TORCH = ("checkpoint.proof.", "checkpoint.formats.open")


def name_of(path: Path) -> str:
    """megatron_llamapro/model/build.py → model.build."""
    return ".".join(path.with_suffix("").parts[1:])


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    room = name_of(path).split(".")[0]
    imported = set(imports_of(path))
    assert not any(name.startswith("megatron.training") for name in imported)
    ours = {name.split(".")[1] for name in imported if name.startswith("megatron_llamapro.")} & set(ROOMS)
    assert ours - {room} <= set(ROOMS[room].split())
    if room in OF_RUNTIME:
        of_runtime = {name.split(".")[2] for name in imported if name.startswith("megatron_llamapro.runtime.")}
        assert of_runtime <= {OF_RUNTIME[room]}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[1] == "checkpoint"], ids=str)
def test_folders_of_checkpoint_import_one_way(path: Path) -> None:
    folder = path.parts[2] if len(path.parts) > 3 else ""
    own = ("megatron_llamapro", "checkpoint")
    imported = [name.split(".")[2:] for name in imports_of(path) if tuple(name.split(".")[:2]) == own]
    folders = {rest[0] if rest[0] in CHECKPOINT_FOLDERS else "" for rest in imported if rest}
    assert folders - {folder} <= set(CHECKPOINT_FOLDERS[folder].split(" "))


def test_no_files_import_each_other_in_a_circle() -> None:
    names = {f"megatron_llamapro.{name_of(path)}": path for path in MODULES}
    graph = {name: names.keys() & set(imports_of(path)) - {name} for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # CycleError names them


def test_a_class_name_is_used_once() -> None:
    files: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(str(path))
    assert {name: paths for name, paths in files.items() if len(paths) > 1} == {}


def test_fast_modules_import_no_torch() -> None:
    names = [name for name in map(name_of, MODULES) if name.split(".")[0] in WITHOUT_TORCH]
    names = [name for name in (*names, *WITHOUT_TORCH_TOO) if not name.startswith(WITH_TORCH)]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'megatron_llamapro.{name}')\n"
        "    if loaded := {'torch', 'megatron', 'transformers'} & set(sys.modules): sys.exit(f'{name}: {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_stay_small() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in (*MODULES, *Path("tools").glob("*.py"))}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
