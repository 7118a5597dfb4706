"""Locates tensors in files of `torch.save`, and lays out new files, without torch.

Such a file is an uncompressed zip: `data.pkl` describes an object whose tensors point to records `data/0`, `data/1`, …
(torch 2.x, `torch/serialization.py`). torch does not check the records' CRC-32 when it loads, so it is left 0, as after
`torch.serialization.set_crc32_options(False)`. The manifest's content hashes do the same work at a tenth of the cost.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from megatron_llamapro.checkpoint.formats.pickles import Call, Global, Persistent, Record, dumps, load
from megatron_llamapro.checkpoint.tensors.weight_map import Shape
from megatron_llamapro.families.hf_config import ITEMSIZES

_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
_DTYPES = {f"torch.{storage}": dtype for dtype, storage in _STORAGES.items()}
_OTHER_STORAGES = ("Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "Float8_e4m3fn", "Float8_e5m2")

TORCH_GLOBALS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *_DTYPES,
        *(f"torch.{name}Storage" for name in (*_OTHER_STORAGES, "Untyped")),
    }
)
"""The names that describe tensors in a `torch.save` file."""

_ROOT = "archive"
_ALIGNMENT = 64
_MAX_PICKLE_BYTES = 256 * 2**20
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_UTF8 = 0x800
_DATE = 33  # 1980-01-01
_LIMIT32 = 0xFFFFFFFF


@dataclass(frozen=True)
class ArchivedTensor:
    """A tensor of a file, stored row-major from byte `offset`."""

    dtype: str
    """A key of `ITEMSIZES`, or "other"."""
    shape: Shape
    offset: int
    """Offset in bytes in the file (or section) that was read."""


@dataclass(frozen=True)
class ArchiveLayout:
    """A file to write: the bytes that are known in advance, and where the tensors' bytes go."""

    fixed: tuple[tuple[int, bytes], ...]
    """(offset, bytes)"""
    tensor_offsets: tuple[int, ...]
    num_bytes: int


def tensor_call(key: str, dtype: str, shape: Shape) -> Call:
    """Return the description, in `data.pkl`, of a contiguous tensor that is alone in storage `key`."""
    numel = math.prod(shape)
    strides = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    storage = Persistent(("storage", Global("torch", _STORAGES[dtype]), key, "cpu", numel))
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, tuple(shape), strides, False, hooks))


def archive_layout(value: object, storages: Sequence[int]) -> ArchiveLayout:
    """Return the layout of a file with `value`. Its tensors (`tensor_call`) are in storages "0", "1", …

    `storages` are the sizes of the storages in bytes.
    """
    layout = _ZipLayout()
    layout.add("data.pkl", dumps(value))
    layout.add("byteorder", b"little")
    layout.add("version", b"3\n")
    offsets = tuple(layout.reserve(f"data/{number}", size) for number, size in enumerate(storages))
    return layout.finished(offsets)


class _ZipLayout:
    """Places records one after the other, with their data at multiples of 64 bytes, as torch does."""

    def __init__(self) -> None:
        self._fixed: list[tuple[int, bytes]] = []
        self._directory: list[bytes] = []
        self._position = 0

    def add(self, name: str, data: bytes) -> None:
        """Add a record whose data is known."""
        self._fixed.append((self.reserve(name, len(data), zlib.crc32(data)), data))

    def reserve(self, name: str, size: int, crc: int = 0) -> int:
        """Add a record whose data is written later. Return the offset of the data."""
        path, start = f"{_ROOT}/{name}".encode(), self._position
        large = size >= _LIMIT32
        shown = _LIMIT32 if large else size
        extra = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
        extra += _padding(start + _LOCAL.size + len(path) + len(extra))
        header = _LOCAL.pack(b"PK\3\4", 45, _UTF8, 0, 0, _DATE, crc, shown, shown, len(path), len(extra))
        self._fixed.append((start, header + path + extra))
        self._directory.append(_directory_entry(path, start, size, crc))
        data = start + len(header) + len(path) + len(extra)
        self._position = data + size
        return data

    def finished(self, tensor_offsets: tuple[int, ...]) -> ArchiveLayout:
        """Return the layout of the whole file, with its directory at the end."""
        start, count, body = self._position, len(self._directory), b"".join(self._directory)
        after = start + len(body)
        tail = body
        tail += _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, len(body), start)
        tail += _LOCATOR64.pack(b"PK\6\7", 0, after, 1)
        shown = min(count, 0xFFFF)
        tail += _END.pack(b"PK\5\6", 0, 0, shown, shown, min(len(body), _LIMIT32), min(start, _LIMIT32), 0)
        return ArchiveLayout((*self._fixed, (start, tail)), tensor_offsets, start + len(tail))


def _padding(position: int) -> bytes:
    """Return an extra field that aligns the data after it to a multiple of 64."""
    size = -(position + 4) % _ALIGNMENT
    return struct.pack("<2s H", b"FB", size) + b"Z" * size


def _directory_entry(path: bytes, start: int, size: int, crc: int) -> bytes:
    large = size >= _LIMIT32 or start >= _LIMIT32
    extra = struct.pack("<2H3Q", 1, 24, size, size, start) if large else b""
    shown_size, shown_start = (_LIMIT32, _LIMIT32) if large else (size, start)
    fields = (45, 45, _UTF8, 0, 0, _DATE, crc, shown_size, shown_size, len(path), len(extra), 0, 0, 0, 0, shown_start)
    return _CENTRAL.pack(b"PK\1\2", *fields) + path + extra


class DamagedArchiveError(Exception):
    """A file that is not a torch archive, or names a class that it may not."""


def read_archive(file: BinaryIO, *, admitted: Container[str] = TORCH_GLOBALS) -> object:
    """Return the object in a `torch.save` file, with tensors as `ArchivedTensor`s. No tensor data is read.

    Raises:
        DamagedArchiveError: the file is not such a file, is damaged, or names a class that is not `admitted`.
    """
    try:
        records = _records(file)
        root = next(iter(records)).split("/")[0]
        start, size = records[f"{root}/data.pkl"]
        if size > _MAX_PICKLE_BYTES:
            raise ValueError(f"a description of {size} bytes")
        file.seek(start)
        value = load(file.read(size), admitted=admitted)
        return _Tensors({name.removeprefix(f"{root}/data/"): place for name, place in records.items()}).put_into(value)
    except pickle.UnpicklingError as error:
        raise DamagedArchiveError(str(error)) from None
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise DamagedArchiveError(f"it is damaged: {type(error).__name__} {str(error)[:200]!r}") from None


def _records(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return name → (offset, bytes) of every record that torch would find, in the order of the file."""
    places: dict[str, tuple[int, int]] = {}
    length = file.seek(0, 2)
    file.seek(0)
    if file.read(4) != b"PK\3\4":  # zipfile skips bytes before an archive, but torch then reads another file
        raise ValueError("not a torch archive")
    with zipfile.ZipFile(_Cautious(file)) as directory:
        entries = directory.infolist()
    for entry in entries:
        file.seek(entry.header_offset)
        header = _LOCAL.unpack(file.read(_LOCAL.size))
        start = entry.header_offset + _LOCAL.size + header[-2] + header[-1]
        if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > length or entry.filename in places:
            raise ValueError(f"record {entry.filename}")
        places[entry.filename] = (start, entry.file_size)
    return places


class _Cautious:
    """A file for `zipfile` that refuses huge reads. `zipfile` allocates any directory size that the file claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_PICKLE_BYTES:
            position = self.tell()
            size = self.seek(0, 2) - position
            self.seek(position)
            if size > _MAX_PICKLE_BYTES:
                raise ValueError("a directory of absurd size")
        return self._file.read(size)


class _Tensors:
    """Replaces descriptions of tensors by tensors. Only containers are walked, each of them once."""

    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        self._places = places
        self._done: dict[int, tuple[object, object]] = {}  # by id; holding the original keeps its id unique

    def put_into(self, value: object) -> object:
        """Return `value` with the records that describe tensors replaced by the tensors."""
        if id(value) not in self._done:
            self._done[id(value)] = (value, self._replaced(value))
        return self._done[id(value)][1]

    def _replaced(self, value: object) -> object:
        if isinstance(value, Record):
            if value.path == "torch._utils._rebuild_tensor_v2":
                return _tensor(value.args, self._places)
            if value.path == "torch._utils._rebuild_parameter":
                return self.put_into(value.args[0])
            return value
        if isinstance(value, dict):
            return {key: self.put_into(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.put_into(item) for item in value]
        return value


def _tensor(args: tuple, places: Mapping[str, tuple[int, int]]) -> ArchivedTensor:
    reference, first, shape, strides = args[:4]
    kind, storage, key, _, _ = reference.pid
    numbers = [first, *shape, *strides]
    if kind != "storage" or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a damaged tensor")
    dtype = _DTYPES.get(storage.path, "other")
    start, size = places[key]
    if dtype == "other":
        return ArchivedTensor(dtype, tuple(shape), start)
    expected = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    if any(ours != theirs for ours, theirs, length in zip(strides, expected, shape, strict=True) if length > 1):
        raise ValueError("a tensor that is not row-major")
    if (first + math.prod(shape)) * ITEMSIZES[dtype] > size:
        raise ValueError("a tensor larger than its storage")
    return ArchivedTensor(dtype, tuple(shape), start + first * ITEMSIZES[dtype])
