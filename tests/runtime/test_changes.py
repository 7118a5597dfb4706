"""`CHANGES` lists every place where this package changes megatron.core, and fits the installed version."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from upstream_code import PAGE, fingerprint, with_table

from megatron_llamapro.dry_run import fake_world
from megatron_llamapro.runtime import cpu
from megatron_llamapro.runtime.changes import CHANGES, VERSION, Change, How

MODULES = [path for path in sorted(Path("megatron_llamapro").rglob("*.py")) if path.name != "__init__.py"]
# Callers of setattr besides the rows, and its target.
SETATTR = {
    "runtime.cpu": "its table's rows",
    "dry_run.fake_world": "its table's rows, undone",
    "model.skip_frozen": "methods of modules, which have rows",
    "optimizer.param_groups": "a mark on a parameter",
    "checkpoint.proof.transformers_model": "a module of transformers",
}
# Functions that wrap methods of modules with `wrap_method`.
WRAPPING = ("model.skip_frozen.skip_frozen_work", "model.penalty.penalise_added_blocks")
UPGRADE = (
    "\nAfter an upgrade, for every row of megatron_llamapro/runtime/changes.py: read its `until`, and upstream's code "
    "if its fingerprint changed. Remove the row and our code if they are no longer needed; adapt our code if it no "
    "longer fits.\nThen set VERSION and the fingerprints. `python tests/runtime/upstream_code.py` prints them and "
    "writes the table of docs/changes_to_megatron.md."
)

UNLISTED = (
    "\nChange megatron.core only through `become`, a subclass or a table of substitutions, and add a row to "
    "megatron_llamapro/runtime/changes.py. `python tests/runtime/upstream_code.py` prints its fingerprint."
)


def test_the_table_was_written_against_the_installed_version() -> None:
    assert version("megatron-core") == VERSION, UPGRADE


@pytest.mark.parametrize("row", CHANGES, ids=lambda row: f"{row.ours}-{row.upstream.rpartition('.')[2]}")
def test_both_sides_of_a_row_exist_and_upstream_is_unchanged(row: Change) -> None:
    assert resolve_name(f"megatron_llamapro.{row.ours}") is not None
    assert row.replaces and row.why and row.until
    owner = resolve_name(row.upstream)
    gone = [member for member in row.replaces if not hasattr(owner, member)]
    assert gone == [], f"{row.upstream} no longer has these members: {row.ours} changes nothing.{UPGRADE}"
    today = {member: fingerprint(row, member) for member in row.replaces}
    assert today == dict(row.replaces), f"The code behind {row.ours} changed since {VERSION}.{UPGRADE}"


def test_a_rows_class_extends_upstreams_and_defines_its_members() -> None:
    for row in CHANGES:
        if row.how in (How.CLASS, How.SUBCLASS):
            ours, upstream = resolve_name(f"megatron_llamapro.{row.ours}"), resolve_name(row.upstream)
            assert issubclass(ours, upstream)
            assert overridden(ours) == {*row.replaces}, row.ours


def test_every_class_that_overrides_upstreams_methods_has_a_row() -> None:
    listed = {f"megatron_llamapro.{row.ours}" for row in CHANGES if row.how in (How.CLASS, How.SUBCLASS)}
    assert {name for name, kind in our_classes() if overridden(kind)} == listed, UNLISTED


def our_classes() -> Iterator[tuple[str, type]]:
    for path in MODULES:
        if "megatron.core" in path.read_text():
            name = f"megatron_llamapro.{name_of(path)}"
            for kind in vars(importlib.import_module(name)).values():
                if inspect.isclass(kind) and kind.__module__ == name:
                    yield f"{name}.{kind.__qualname__}", kind


def overridden(kind: type) -> set[str]:
    """Return the methods that replace megatron.core's, without constructors and methods that upstream leaves to
    subclasses."""
    names = {name for name in vars(kind) if not name.startswith("__")}
    return {name for name in names for base in kind.__mro__[1:] if is_upstreams(base, name)}


def is_upstreams(base: type, name: str) -> bool:
    method = vars(base).get(name)
    is_method = callable(method) or isinstance(method, (staticmethod, classmethod, property))
    is_abstract = getattr(method, "__isabstractmethod__", False)
    return base.__module__.startswith("megatron.core") and is_method and not is_abstract


def test_only_become_changes_a_class() -> None:
    assert {place for place, target in attributes_set() if target.attr == "__class__"} == {"runtime.upstream"}, UNLISTED


def test_only_known_places_call_setattr() -> None:
    assert {place for place, call in nodes(ast.Call) if ast.unparse(call.func) == "setattr"} == {*SETATTR}, UNLISTED


def test_methods_of_modules_are_wrapped_only_by_rows() -> None:
    wrapped = {
        (place, call.args[1].value) for place, call in nodes(ast.Call) if ast.unparse(call.func) == "wrap_method"
    }
    rows = [row for row in CHANGES if row.ours in WRAPPING]
    listed = {(row.ours.rpartition(".")[0], member) for row in rows for member in row.replaces}
    assert wrapped == listed, UNLISTED


def test_attributes_of_upstreams_modules_are_set_only_by_rows() -> None:
    """For example `filesystem_async._results_queue = …`."""
    from_upstream = {
        (place, alias.asname or alias.name)
        for place, node in [*nodes(ast.Import), *nodes(ast.ImportFrom)]
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).startswith("megatron.")
    }
    places = {(place, ast.unparse(target.value)) for place, target in attributes_set()} & from_upstream
    rows = [row for row in CHANGES if row.how is How.ATTRIBUTE]
    listed = {(row.ours.rpartition(".")[0], row.upstream.rpartition(".")[2]) for row in rows}
    assert places and places <= listed, UNLISTED


def test_the_environment_is_set_only_by_rows() -> None:
    """And by the helper that starts ranks for tests."""
    setters = ("os.environ.setdefault", "os.environ.update", "os.putenv")
    places = {place for place, call in nodes(ast.Call) if ast.unparse(call.func) in setters}
    places |= {place for place, node in nodes(ast.Assign) if "os.environ[" in ast.unparse(node.targets[0])}
    assert places == {"runtime.upstream", "testing.distributed"}, UNLISTED


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path in MODULES:
        yield from ((name_of(path), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def attributes_set() -> Iterator[tuple[str, ast.Attribute]]:
    """Yield the left sides of assignments to attributes."""
    yield from ((place, node) for place, node in nodes(ast.Attribute) if isinstance(node.ctx, ast.Store))


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts[1:])


@pytest.mark.parametrize("module", [cpu, fake_world])
def test_substitutions_in_upstream_are_listed(module) -> None:
    """Rows about torch are not changes to megatron.core."""
    made = {(row.owner, row.name) for row in module.table() if not is_torchs(row.owner)}
    place = module.__name__.removeprefix("megatron_llamapro.")
    rows = [row for row in CHANGES if row.ours == f"{place}._megatron_rows"]
    assert made == {(resolve_name(row.upstream), member) for row in rows for member in row.replaces}, UNLISTED


def is_torchs(owner: object) -> bool:
    return getattr(owner, "__module__", getattr(owner, "__name__", "")).partition(".")[0] == torch.__name__


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text()
    assert f"Links are to {VERSION}," in page
    assert with_table(page) == page, "python tests/runtime/upstream_code.py rewrites it"
