"""Reads and writes pickles without importing anything that they name.

torch's files are pickles that name classes. Ordinary unpickling imports those classes and calls them; a hostile pickle
names `os.system`. Here a class becomes an inert `Record` of its arguments, and a class that is not on the reader's list
is refused. The writer describes classes by name too, so neither direction needs torch.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar


class Record:
    """Stands for an object that a pickle describes: the name of its class, its arguments and its state."""

    path = ""
    """module.name"""

    def __new__(cls, *args: object) -> Record:
        record = super().__new__(cls)
        record.args = args
        record.state = None
        return record

    args: tuple
    state: object

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Ignore items of a class derived from dict. No reader needs them."""

    def append(self, value: object) -> None:
        """Ignore items of a class derived from list. No reader needs them."""

    def field(self, name: str) -> object:
        """Return a field of an object whose state is its `__dict__`.

        Raises:
            KeyError, TypeError: there is no field of that name.
        """
        return self.state[name]  # type: ignore[index]


# Enumerations of torch. Python 3.11.0 to 3.11.3 pickle a member as getattr(class, name), others as class(value).
_ENUMS = frozenset(
    {
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.planner.WriteItemType",
    }
)
_MEMBER = re.compile(r"[A-Z][A-Z0-9_]*")


def _member(of: object, name: object) -> Record:
    """Stand in for `getattr` in a pickle: return a member of one of those enumerations, and refuse all else."""
    is_enum = isinstance(of, type) and issubclass(of, Record) and of.path in _ENUMS
    if is_enum and isinstance(name, str) and _MEMBER.fullmatch(name):
        return of(name)
    raise pickle.UnpicklingError(f"it asks for builtins.getattr of {str(name)[:200]}")


# Names that load as real objects. They can only hold values.
_PLAIN: dict[str, object] = {
    "builtins.getattr": _member,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
}


class _InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """The standard library's unpickler in Python. The C version allocates any length that a pickle claims."""

    dispatch: ClassVar[dict] = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, data: bytes, admitted: Container[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._admitted = admitted
        self._classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> object:
        path = f"{module}.{name}"
        if path in _PLAIN:
            return _PLAIN[path]
        if path not in self._admitted:
            raise pickle.UnpicklingError(f"it asks for {path[:200]}")
        if path not in self._classes:
            self._classes[path] = type(name, (Record,), {"path": path})
        return self._classes[path]

    def persistent_load(self, pid: object) -> object:
        return Persistent(pid)


def load(data: bytes, *, admitted: Container[str]) -> object:
    """Return the object that a pickle describes, made of plain values and of `Record`s of the `admitted` names.

    Raises:
        pickle.UnpicklingError: the pickle names anything else, or is damaged.
    """
    try:
        return _InertUnpickler(data, admitted).load()
    except pickle.UnpicklingError:
        raise
    except (MemoryError, RecursionError) as error:
        raise pickle.UnpicklingError(f"it is damaged: {type(error).__name__}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise pickle.UnpicklingError(f"it is damaged: {str(error)[:200]!r}") from None


@dataclass(frozen=True)
class Persistent:
    """A reference from the pickle to a storage in the same archive."""

    pid: object


@dataclass(frozen=True)
class Global:
    """A class or function by name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """The result of calling `function` with `args`. If there is a `state`, it is then set on the result."""

    function: Global
    args: tuple = ()
    state: object = None


@dataclass(frozen=True)
class Pairs:
    """A dict whose keys are described objects. Those cannot be keys of a Python dict."""

    items: tuple[tuple[object, object], ...]


NEW_OBJECT = Global("copyreg", "__newobj__")
"""The function of a `Call` that makes an object without `__init__`. Its first argument is the class."""


def instance(module: str, name: str, **fields: object) -> Call:
    """Return the call that makes an object with `__dict__` set to `fields`, without calling its `__init__`."""
    return Call(NEW_OBJECT, (Global(module, name),), state=fields)


def dumps(value: object) -> bytes:
    """Return `value` as a pickle (protocol 2): plain values, `Global`, `Call` and `Persistent` in any nesting."""
    return b"".join((pickle.PROTO, b"\x02", *_opcodes(value), pickle.STOP))


def _opcodes(value: object) -> Iterator[bytes]:
    writer = _WRITERS.get(type(value))
    if writer is None:
        raise TypeError(f"cannot pickle {type(value).__name__}")
    yield from writer(value)


def _int(value: int) -> Iterator[bytes]:
    if 0 <= value < 256:
        yield pickle.BININT1 + struct.pack("<B", value)
    elif -(2**31) <= value < 2**31:
        yield pickle.BININT + struct.pack("<i", value)
    else:
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        yield pickle.LONG1 + struct.pack("<B", len(digits)) + digits


def _str(value: str) -> Iterator[bytes]:
    text = value.encode("utf-8")
    yield pickle.BINUNICODE + struct.pack("<I", len(text)) + text


def _tuple(value: tuple) -> Iterator[bytes]:
    yield pickle.MARK
    for item in value:
        yield from _opcodes(item)
    yield pickle.TUPLE


def _list(value: list) -> Iterator[bytes]:
    yield pickle.EMPTY_LIST + pickle.MARK
    for item in value:
        yield from _opcodes(item)
    yield pickle.APPENDS


def _pairs(items: Iterable[tuple[object, object]]) -> Iterator[bytes]:
    yield pickle.EMPTY_DICT + pickle.MARK
    for key, item in items:
        yield from _opcodes(key)
        yield from _opcodes(item)
    yield pickle.SETITEMS


def _global(value: Global) -> Iterator[bytes]:
    yield pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()


def _call(value: Call) -> Iterator[bytes]:
    if value.function == NEW_OBJECT:
        yield from _opcodes(value.args[0])
        yield from _opcodes(value.args[1:])
        yield pickle.NEWOBJ
    else:
        yield from _opcodes(value.function)
        yield from _opcodes(value.args)
        yield pickle.REDUCE
    if value.state is not None:
        yield from _opcodes(value.state)
        yield pickle.BUILD


def _persistent(value: Persistent) -> Iterator[bytes]:
    yield from _opcodes(value.pid)
    yield pickle.BINPERSID


_WRITERS: dict[type, Callable[..., Iterator[bytes]]] = {
    type(None): lambda value: iter((pickle.NONE,)),
    bool: lambda value: iter((pickle.NEWTRUE if value else pickle.NEWFALSE,)),
    int: _int,
    float: lambda value: iter((pickle.BINFLOAT + struct.pack(">d", value),)),
    str: _str,
    tuple: _tuple,
    list: _list,
    dict: lambda value: _pairs(value.items()),
    Pairs: lambda value: _pairs(value.items),
    Global: _global,
    Call: _call,
    Persistent: _persistent,
}
