"""Data is identified by its content, not by files beside it. Other data is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import BlendEntry, DataConfig
from megatron_llamapro.data.sampling import check_same_order, data_order_fingerprint
from megatron_llamapro.data.token_files import content_digest, is_content, paths_of


def order(prefix: Path) -> dict[str, object]:
    data = DataConfig(train=(BlendEntry(str(prefix), 2.0),), seq_length=8)
    return data_order_fingerprint(data, num_samples=10, seed=1)


def check(stored: dict[str, object], prefix: Path) -> None:
    check_same_order(stored, order(prefix), train=(BlendEntry(str(prefix), 2.0),))


def turn_a_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_side_file_does_not_count(copied_pair: Path, pair: Path) -> None:
    stored = order(copied_pair)
    assert stored == order(pair)
    side_file = paths_of(copied_pair)[2]
    side_file.write_text("damaged")
    check(stored, copied_pair)
    side_file.unlink()
    check(stored, copied_pair)


@pytest.mark.parametrize("with_side_file", [True, False])
@pytest.mark.parametrize("ending", [0, 1], ids=["bin", "idx"])
@pytest.mark.parametrize("place", [40, 0.5, -1])
def test_other_tokens_are_refused(place: float, ending: int, with_side_file: bool, copied_pair: Path) -> None:
    stored = order(copied_pair)
    path = paths_of(copied_pair)[ending]
    turn_a_byte(path, int(place) if abs(place) >= 1 else path.stat().st_size // 2)
    if not with_side_file:
        paths_of(copied_pair)[2].unlink()
    with pytest.raises(DataError, match=r"started with another data\.train"):
        check(stored, copied_pair)


def test_other_weights_or_numbers_of_sets_are_refused(copied_pair: Path) -> None:
    [[digest, weight]] = order(copied_pair)["blend"]
    for blend in ([[digest, weight + 1]], [], [[digest, weight]] * 2, None):
        with pytest.raises(DataError, match=r"started with another data\.train"):
            check({**order(copied_pair), "blend": blend}, copied_pair)


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


# Fingerprints in checkpoints of earlier versions: tokens with a side file, tokens without one, and conversations.
EARLIER: dict[str, Callable[[bytes, bytes], str]] = {
    "side file": lambda tokens, index: sha256(tokens),
    "no side file": lambda tokens, index: sha256(
        index, tokens[: 2**20], tokens[max(len(tokens) - 2**20, 0) :], str(len(tokens)).encode()
    ),
    "conversations": lambda tokens, index: sha256(
        hashlib.sha256(index).digest(), bytes.fromhex(hashlib.sha256(tokens).hexdigest())
    ),
}


@pytest.mark.parametrize("with_side_file", [True, False])
@pytest.mark.parametrize("kind", EARLIER)
def test_runs_of_earlier_versions_resume(kind: str, with_side_file: bool, copied_pair: Path) -> None:
    bin_path, index_path, side_file = paths_of(copied_pair)
    stored = {**order(copied_pair), "blend": [[EARLIER[kind](bin_path.read_bytes(), index_path.read_bytes()), 2.0]]}
    if not with_side_file:
        side_file.unlink()
    check(stored, copied_pair)
    turn_a_byte(index_path if kind != "side file" else bin_path, -1)
    if with_side_file and kind == "side file":
        side_file.unlink()
    with pytest.raises(DataError, match=r"started with another data\.train"):
        check(stored, copied_pair)


def test_blocks_across_a_large_file_are_hashed(tmp_path: Path) -> None:
    """A tenth of 40 MiB is read, from the first byte to the last: a change to any stretch of 320 KiB is found."""
    tokens = numpy.arange(10 * 2**20, dtype=numpy.int32)
    builder = IndexedDatasetBuilder(str(tmp_path / "large.bin"), dtype=numpy.int32)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "large.idx"))
    first = content_digest(tmp_path / "large")
    assert first == content_digest(tmp_path / "large") and is_content(first, tmp_path / "large")
    size, stretch = tokens.nbytes, 320 * 2**10
    with (tmp_path / "large.bin").open("r+b") as file:
        for start in (0, size // 3, size // 2 + 12345, size - stretch):
            file.seek(start)
            before = file.read(stretch)
            file.seek(start)
            file.write(bytes(stretch))
            file.flush()
            assert not is_content(first, tmp_path / "large"), start
            file.seek(start)
            file.write(before)
            file.flush()
    assert is_content(first, tmp_path / "large")
