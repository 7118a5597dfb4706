"""What `make test-fast` leaves out: everything beside the rooms of the package, and in the rooms what draws its inputs
by the hundred (tests/fuzzing.py) or starts processes. Of each file's tests that start processes, the first case stays.

A test starts processes if it, its fixtures, or the functions of its file that they call name what starts them.
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
    """Mark what `make test-fast` leaves out."""
    begun: set[Path] = set()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        room = item.path.relative_to(TESTS).parts[0]
        starts = any(names_of(function) & STARTS_PROCESSES for function in functions_of(item))
        if room in NO_ROOMS or "fuzz_settings" in item.module.__dict__ or (starts and item.path in begun):
            item.add_marker("slow")
        if starts:
            begun.add(item.path)


def functions_of(item: pytest.Function) -> list[FunctionType]:
    """A test, and its fixtures."""
    fixtures = (definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values())
    return [function for function in (item.function, *fixtures) if isinstance(function, FunctionType)]


@functools.cache
def names_of(function: FunctionType) -> frozenset[str]:
    """Names that it reads, and those that functions and classes of its file read which it reads."""
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
    inner = (names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*inner)
