"""Pickles without imports: Python reads what we write, and our reader runs nothing."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llamapro.checkpoint.formats.pickles import Call, Global, Pairs, Record, dumps, instance, load

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=10,
)


@given(PLAIN)
def test_plain_values_survive_a_round_trip(value: object) -> None:
    data = dumps(value)
    assert pickle.loads(data) == value
    assert load(data, admitted=()) == value


def test_described_objects_load_as_python_makes_them() -> None:
    described = {
        "called": Call(Global("collections", "OrderedDict")),
        "made": instance("argparse", "Namespace", rows=3),
        "pairs": Pairs(((Call(Global("builtins", "complex"), (1.0, 2.0)), "a key that is described"),)),
    }
    made = pickle.loads(dumps(described))
    assert made["called"] == collections.OrderedDict()
    assert made["made"].rows == 3
    assert made["pairs"] == {1 + 2j: "a key that is described"}


def test_admitted_classes_become_records() -> None:
    record = load(dumps(instance("argparse", "Namespace", rows=3)), admitted={"argparse.Namespace"})
    assert isinstance(record, Record) and record.path == "argparse.Namespace" and record.field("rows") == 3


ENUM = "torch.distributed.checkpoint.planner.WriteItemType"


def test_an_enumeration_member_is_read_by_name() -> None:
    """Python 3.11.0 to 3.11.3 pickle it this way; Debian 12 has 3.11.2."""
    described = Call(Global("builtins", "getattr"), (Global(*ENUM.rsplit(".", 1)), "SHARD"))
    member = load(dumps(described), admitted={ENUM})
    assert isinstance(member, Record) and (member.path, member.args) == (ENUM, ("SHARD",))


@pytest.mark.parametrize(
    "described",
    [
        Call(Global("builtins", "getattr"), (Global(*ENUM.rsplit(".", 1)), "__class__")),
        Call(Global("builtins", "getattr"), (Global(*ENUM.rsplit(".", 1)), "_member_map_")),
        Call(Global("builtins", "getattr"), (Global("pathlib", "PosixPath"), "UNLINK")),
        Call(Global("builtins", "getattr"), ("text", "JOIN")),
        Call(Global("builtins", "getattr"), (Global("builtins", "set"), "ADD")),
        Call(Global("builtins", "getattr"), (Global(*ENUM.rsplit(".", 1)), "SHARD", "default")),
    ],
)
def test_other_attributes_are_refused(described: Call) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load(dumps(described), admitted={ENUM, "pathlib.PosixPath"})


class Hostile:
    """Runs a function when it is unpickled the ordinary way."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


HOSTILE = {
    "a command": lambda path: Hostile(os.system, f"touch {path}"),
    "a method": lambda path: Hostile(Path.touch, path),
    "evaluated text": lambda path: Hostile(eval, f"open({str(path)!r}, 'w')"),
    "another pickle": lambda path: Hostile(pickle.loads, pickle.dumps(Hostile(os.system, f"touch {path}"))),
    "an attribute": lambda path: Hostile(getattr, Path, "touch"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_unpickling_runs_nothing(make: object, tmp_path: Path) -> None:
    data = pickle.dumps({"weights": make(tmp_path / "ran")})
    with pytest.raises(pickle.UnpicklingError, match="it asks for "):
        load(data, admitted={"torch.Size"})
    assert list(tmp_path.iterdir()) == []


def test_an_admitted_name_runs_nothing(tmp_path: Path) -> None:
    """It becomes a record; calling the record does nothing."""
    data = pickle.dumps(Hostile(os.system, f"touch {tmp_path / 'ran'}"))
    record = load(data, admitted={"posix.system", "os.system"})
    assert isinstance(record, Record) and record.args == (f"touch {tmp_path / 'ran'}",)
    assert list(tmp_path.iterdir()) == []


DAMAGED = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "a length beyond the end": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
    "a buffer of a terabyte": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a place in the memo at four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "an extension": b"\x80\x02\x82\x01.",
    "an empty stack": b"\x80\x02a.",
    "deep nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_raises_without_allocating(data: bytes) -> None:
    try:
        load(data, admitted=())
    except pickle.UnpicklingError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_an_error(data: bytes) -> None:
    try:
        load(b"\x80\x02" + data, admitted={"torch.Size"})
    except pickle.UnpicklingError as error:
        assert len(str(error)) < 600
