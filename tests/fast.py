"""Marks slow tests for `make test-fast`, which runs `pytest -m "not slow"`. Do not mark tests by hand.

Three kinds of tests are slow:

- tests in a folder of `NO_ROOMS`, because these folders do not test a room of the package;
- tests in a file that imports `fuzz_settings` (tests/fuzzing.py), because they draw hundreds of inputs;
- tests that start processes, except the first such case of each file.

A test starts processes if its code mentions a name of `STARTS_PROCESSES`. Its fixtures count too, and so do functions
and classes of the same file that it uses.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from types import CodeType, FunctionType

import pytest

TESTS = Path(__file__).parent
NO_ROOMS = {"benchmarks", "docker", "docs", "examples", "slurm"}
STARTS_PROCESSES = {"run_distributed", "run_apart", "programs", "Program", "subprocess"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests. tests/conftest.py imports this function, so that pytest calls it as a hook."""
    seen: set[Path] = set()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        room = item.path.relative_to(TESTS).parts[0]
        starts = any(names_of(function) & STARTS_PROCESSES for function in functions_of(item))
        if room in NO_ROOMS or "fuzz_settings" in item.module.__dict__ or (starts and item.path in seen):
            item.add_marker("slow")
        if starts:
            seen.add(item.path)


def functions_of(item: pytest.Function) -> list[FunctionType]:
    """Return the functions of a test and its fixtures."""
    fixtures = (definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values())
    return [function for function in (item.function, *fixtures) if isinstance(function, FunctionType)]


@functools.cache
def names_of(function: FunctionType) -> frozenset[str]:
    """Return all names in a function's code, and in the functions and classes of its module that it uses."""
    found, left = set(), [function]
    while left:
        names = names_in(left.pop().__code__) - found
        found |= names
        for value in (function.__globals__.get(name) for name in names):
            if getattr(value, "__module__", None) == function.__module__:
                methods = vars(value).values() if isinstance(value, type) else [value]
                left += [inspect.unwrap(each) for each in methods if isinstance(each, FunctionType)]
    return frozenset(found)


def names_in(code: CodeType) -> set[str]:
    """Return the global and attribute names in a code object, nested functions included."""
    inner = (names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*inner)
