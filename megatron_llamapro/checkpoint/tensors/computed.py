"""Rows that are computed when they are read: casts, means, dials, random numbers. Only these rows need torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy

from megatron_llamapro.checkpoint.tensors.streaming import Rows
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families.hf_config import ITEMSIZES

if TYPE_CHECKING:
    import torch


def cast(rows: Rows, *, source: str, target: str, name: str) -> Rows:
    """Return `rows` cast to `target`, or `rows` itself if the types are equal. Raises what `CastRows` raises."""
    return rows if source == target else CastRows(rows, source=source, target=target, name=name)


def cast_along(rows: Rows, *, types: Sequence[str], name: str) -> Rows:
    """Return `rows`, of type `types[0]`, cast to each later type in turn. Raises what `CastRows` raises."""
    for source, target in pairwise(types):
        rows = cast(rows, source=source, target=target, name=name)
    return rows


class CastRows:
    """Rows cast to another type.

    Raises (from `fill`):
        CheckpointError: a finite value becomes infinite (7e4 fits bfloat16 but not float16).
    """

    is_zero = False

    def __init__(self, rows: Rows, *, source: str, target: str, name: str) -> None:
        self._rows, self._source, self._target, self._name = rows, source, target, name

    def fill(self, start: int, out: numpy.ndarray) -> None:
        before = _values(self._rows, start, out, self._source, ITEMSIZES[self._target])
        out[:] = _raw(_narrowed(before, self._target, name=self._name))


class MeanRows:
    """The mean of several tensors' rows, computed in float32.

    A value that all tensors share keeps its exact bits. (Three times a float32 number, divided by 3, may be another.)
    """

    is_zero = False

    def __init__(self, *tensors: Rows, dtype: str) -> None:
        self._tensors, self._dtype = tensors, dtype

    def fill(self, start: int, out: numpy.ndarray) -> None:
        torch, itemsize = _torch(), ITEMSIZES[self._dtype]
        first, *others = (_values(rows, start, out, self._dtype, itemsize) for rows in self._tensors)
        total, is_shared = first.float(), torch.ones_like(first, dtype=torch.bool)
        for values in others:
            total = total + values.float()
            is_shared &= _bits(values) == _bits(first)
        mean = (total / len(self._tensors)).to(first.dtype)
        out[:] = _raw(torch.where(is_shared, first, mean))


class MergedRows:
    """Rows of W + scaling * B A, computed in float32. Where the adapter adds 0, W keeps its exact bits."""

    is_zero = False

    def __init__(
        self, weight: Rows, *, read_a: Callable[[], numpy.ndarray], b: Rows, scaling: float, dtype: str
    ) -> None:
        """`read_a` returns all of A [rank, columns of W] as uint8. `b` holds the rows of B [rows of W, rank]. All
        three tensors have type `dtype`."""
        self._weight, self._read_a, self._b = weight, read_a, b
        self._scaling, self._dtype = scaling, dtype

    @functools.cached_property
    def _a(self) -> torch.Tensor:
        return _torch().from_numpy(self._read_a()).view(_dtype(self._dtype)).float()

    def fill(self, start: int, out: numpy.ndarray) -> None:
        itemsize = ITEMSIZES[self._dtype]
        weight = _values(self._weight, start, out, self._dtype, itemsize)
        narrow = numpy.empty((len(out), len(self._a) * itemsize), numpy.uint8)
        added = self._scaling * (_values(self._b, start, narrow, self._dtype, itemsize).float() @ self._a)
        merged = (weight.float() + added).to(weight.dtype)
        out[:] = _raw(_torch().where(added == 0, weight, merged))


class DialedRows:
    """Rows of W0 + scale * (W - W0), computed in float32. Where W equals W0, W0 keeps its exact bits.

    Raises (from `fill`):
        CheckpointError: a finite value becomes infinite in `dtype`.
    """

    is_zero = False

    def __init__(self, rows: Rows, *, original: Rows | None, scale: float, dtype: str, name: str) -> None:
        """Both have type `dtype`. Without an `original`, W0 is 0."""
        self._rows, self._original, self._scale = rows, original, scale
        self._dtype, self._name = dtype, name

    def fill(self, start: int, out: numpy.ndarray) -> None:
        itemsize = ITEMSIZES[self._dtype]
        after = _values(self._rows, start, out, self._dtype, itemsize)
        if self._original is None:
            out[:] = _raw(_narrowed(self._scale * after.float(), self._dtype, name=self._name))
            return
        before = _values(self._original, start, out, self._dtype, itemsize)
        wide = before.float() + self._scale * (after.float() - before.float())
        out[:] = _raw(_torch().where(after == before, before, _narrowed(wide, self._dtype, name=self._name)))


class NormalRows:
    """Normally distributed rows. The same seed gives the same rows. Portions must be read in order."""

    is_zero = False

    def __init__(self, *, seed: int, std: float, dtype: str) -> None:
        self._seed, self._std, self._dtype = seed, std, dtype
        self._restart()

    def _restart(self) -> None:
        self._generator, self._next = numpy.random.Generator(numpy.random.Philox(self._seed)), 0

    def fill(self, start: int, out: numpy.ndarray) -> None:
        if start == 0:
            self._restart()
        assert start == self._next, "rows out of order"
        self._next += len(out)
        shape = (len(out), out.shape[1] // ITEMSIZES[self._dtype])
        values = self._generator.standard_normal(shape, dtype=numpy.float32) * numpy.float32(self._std)
        out[:] = _raw(_torch().from_numpy(values).to(_dtype(self._dtype)))


class OneRows:
    """Rows of ones."""

    is_zero = False

    def __init__(self, *, dtype: str) -> None:
        self._dtype = dtype

    def fill(self, start: int, out: numpy.ndarray) -> None:
        shape = (len(out), out.shape[1] // ITEMSIZES[self._dtype])
        out[:] = _raw(_torch().ones(shape, dtype=_dtype(self._dtype)))


class ZeroRows:
    """Rows of +0.0. They are not computed as 0 times a weight, because that can give -0.0 or NaN."""

    is_zero = True

    def fill(self, start: int, out: numpy.ndarray) -> None:
        out[:] = 0


@functools.cache
def _torch():
    import torch

    return torch


def _dtype(name: str) -> torch.dtype:
    return getattr(_torch(), name)


def _values(rows: Rows, start: int, out: numpy.ndarray, dtype: str, out_itemsize: int) -> torch.Tensor:
    """Return the values for the rows of `out`, [rows, columns] in `dtype`."""
    width = out.shape[1] // out_itemsize * ITEMSIZES[dtype]
    raw = numpy.empty((len(out), width), numpy.uint8)
    rows.fill(start, raw)
    return _torch().from_numpy(raw).view(_dtype(dtype))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the values' bits as integers. Unlike the values, equal NaNs are equal, and zeros of two signs are not."""
    torch = _torch()
    return values.view(torch.int32 if values.itemsize == 4 else torch.int16)


def _narrowed(values: torch.Tensor, dtype: str, *, name: str) -> torch.Tensor:
    after = values.to(_dtype(dtype))
    if _num_infinite(after) > _num_infinite(values):
        raise CheckpointError(
            f"{name} has values that {dtype} cannot hold (they become infinite): keep the source's type, or choose "
            "bfloat16 or float32"
        )
    return after


def _raw(values: torch.Tensor) -> numpy.ndarray:
    return values.contiguous().view(_torch().uint8).numpy()


def _num_infinite(values: torch.Tensor) -> int:
    return int(_torch().isfinite(values).logical_not().sum())
