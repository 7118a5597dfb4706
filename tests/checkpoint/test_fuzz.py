"""For any damage to a checkpoint's headers, a conversion ends in success or in one line. It never ends in a traceback,
a hang or a huge allocation. `FUZZ_EXAMPLES=5000 make fuzz` tries more."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzz_settings
from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.config.errors import LlamaProError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import stack_layers

Tiny = Callable[..., Path]

SEEDED = fuzz_settings(60)
MAX_GROWTH_BYTES = 500 * 2**20

NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf"), 1e308])
VALUES = st.recursive(
    NUMBERS
    | st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.sampled_from(["F32", "BF16", "model_type", "\0", "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def paths_in(value: object, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in paths_in(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, document: dict) -> object:
    """Draw a JSON document with one to three of its values replaced, removed or repeated."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in paths_in(result) if place]
        if not places:
            return result
        *way, last = draw(st.sampled_from(places))
        holder = result
        for key in way:
            holder = holder[key]
        if draw(st.integers(0, 4)) == 0:
            holder.pop(last)
        else:
            holder[last] = draw(VALUES)
    return result


def ends_well(convert: Callable, source: Path) -> None:
    """Assert that the conversion succeeds or raises one line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        try:
            convert(source, Path(folder) / "target")
        except (LlamaProError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            assert not list(Path(folder).iterdir())
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MAX_GROWTH_BYTES, f"{grown / 2**20:.0f} MiB"


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Give the file another content inside the block."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


@pytest.fixture(scope="module")
def source(tiny_llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("fuzz") / "hf")


@pytest.fixture(scope="module")
def megatron(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf_to_megatron(source, tmp_path_factory.mktemp("fuzz") / "megatron", expansion=Expansion.at(1))
    return next(tmp_path_factory.getbasetemp().glob("fuzz*/megatron"))


@SEEDED
@given(data=st.data())
def test_damaged_configurations_end_well(data: st.DataObject, source: Path) -> None:
    path = source / "config.json"
    with changed(path, json.dumps(data.draw(mutated(json.loads(path.read_text())))).encode()):
        ends_well(hf_to_megatron, source)


@SEEDED
@given(data=st.data())
def test_damaged_safetensors_headers_end_well(data: st.DataObject, source: Path) -> None:
    path = source / "model.safetensors"
    original = path.read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    text = json.dumps(data.draw(mutated(json.loads(original[8 : 8 + length])))).encode()
    stated = data.draw(st.sampled_from([len(text)] * 8 + [0, 2**63, len(text) - 1, len(text) + 1]))
    with changed(path, struct.pack("<Q", stated) + text + original[8 + length :]):
        ends_well(hf_to_megatron, source)


@SEEDED
@given(data=st.data())
def test_damaged_manifests_end_well(data: st.DataObject, megatron: Path) -> None:
    path = megatron / "llamapro.json"
    with changed(path, json.dumps(data.draw(mutated(json.loads(path.read_text())))).encode()):
        ends_well(megatron_to_hf, megatron)


@pytest.fixture(scope="module")
def stacked(megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stack_layers(megatron, tmp_path_factory.mktemp("fuzz") / "stacked")


@pytest.fixture(scope="module")
def shards(megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "shards"
    megatron_to_megatron(megatron, folder, kind=legacy(tensor_model_parallel_size=2))
    return folder


TORCH_DIST_FILES = (".metadata", "__0_0.distcp", "common.pt")
FILES = {
    "megatron": TORCH_DIST_FILES,
    "stacked": TORCH_DIST_FILES,
    "shards": ("release/mp_rank_01/model_optim_rng.pt", "latest_checkpointed_iteration.txt"),
}


@pytest.mark.parametrize("layers", FILES)
@SEEDED
@given(data=st.data())
def test_damaged_index_and_tensor_files_end_well(
    data: st.DataObject, layers: str, request: pytest.FixtureRequest
) -> None:
    """Flip bits of the index and of the archives' directories, and cut off tails."""
    megatron = request.getfixturevalue(layers)
    path = megatron / data.draw(st.sampled_from(FILES[layers]))
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 100, len(damaged) // 2]))
    with changed(path, bytes(damaged[: len(damaged) - cut])):
        ends_well(megatron_to_hf, megatron)
