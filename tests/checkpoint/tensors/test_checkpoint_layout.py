"""Maps of tensor positions: the pieces of any division make up the whole, and gaps are found."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llamapro.checkpoint.tensors.layout import Piece, StoredTensor, is_whole, parts_of, whole
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles, StoredRows, hash_rows, read_whole, stored_hash
from megatron_llamapro.checkpoint.tensors.weight_map import weights_of
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.testing.tiny_models import tiny_shape

SHAPE = tiny_shape(num_layers=1)
PATH = Path("file")


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Cut `length` into spans."""
    points = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    edges = [0, *points, length]
    return list(itertools.pairwise(edges))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_pieces_of_any_division_make_every_part_whole(data: st.DataObject) -> None:
    """Cut a Megatron tensor by rows and columns at any place, and find Hugging Face's tensors in the pieces."""
    for weight in weights_of(SHAPE):
        rows, columns = weight.megatron_shape[0], (*weight.megatron_shape, 1)[1]
        merged = numpy.arange(rows * columns, dtype=numpy.uint16).reshape(rows, columns)
        pieces, stored, offset = [], [], 0
        for row in data.draw(cuts(rows)):
            for column in data.draw(cuts(columns)):
                part = merged[slice(*row), slice(*column)]
                pieces.append(Piece(row, column, PATH, offset))
                stored.append(part.tobytes())
                offset += part.nbytes
        content = b"".join(stored)
        expected = iter(parts_of(weight, [Piece((0, rows), (0, columns), PATH, 0)], shape=SHAPE, itemsize=2).values())
        for part in parts_of(weight, pieces, shape=SHAPE, itemsize=2).values():
            assert is_whole(part)
            assert (gather(part, content) == gather(next(expected), merged.tobytes())).all()


def gather(tensor: StoredTensor, content: bytes) -> numpy.ndarray:
    """Assemble a tensor's values, two bytes each, from its pieces."""
    values = numpy.zeros((tensor.num_rows, tensor.num_columns), numpy.uint16)
    for piece in tensor.pieces:
        data = content[piece.offset :][: 2 * piece.num_elements]
        part = numpy.frombuffer(data, numpy.uint16).reshape(-1, piece.num_columns)
        values[slice(*piece.rows), slice(*piece.columns)] = part
    return values


UNSOUND = {
    "a gap between rows": [((0, 2), (0, 3)), ((3, 4), (0, 3))],
    "rows that overlap": [((0, 3), (0, 3)), ((2, 4), (0, 3))],
    "rows that end early": [((0, 3), (0, 3))],
    "a gap between columns": [((0, 4), (0, 1)), ((0, 4), (2, 3))],
    "columns that overlap": [((0, 4), (0, 2)), ((0, 4), (1, 3))],
    "nothing": [],
    "a hole in a grid": [((0, 2), (0, 2)), ((0, 2), (2, 3)), ((2, 4), (0, 2))],
}


@pytest.mark.parametrize("pieces", UNSOUND.values(), ids=UNSOUND.keys())
def test_gaps_and_overlaps_are_found(pieces: list) -> None:
    tensor = StoredTensor((4, 3), tuple(Piece(rows, columns, PATH, 0) for rows, columns in pieces))
    assert not is_whole(tensor)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[numpy.ndarray, StoredTensor]:
    """Store a matrix of 9 x 5 two-byte values, its left and right columns apart."""
    values = numpy.arange(45, dtype=numpy.uint16).reshape(9, 5)
    (tmp_path / "data").write_bytes(values[:, :2].tobytes() + values[:, 2:].tobytes())
    pieces = (Piece((0, 9), (0, 2), tmp_path / "data", 0), Piece((0, 9), (2, 5), tmp_path / "data", 36))
    return values, StoredTensor((9, 5), pieces)


def test_any_portion_of_rows_can_be_read(stored: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    values, tensor = stored
    with SourceFiles() as files:
        assert (read_whole(tensor, files, 2).view(numpy.uint16) == values).all()
        hashes = set()
        for chunk_bytes in (1, 20, 35, 10**6):
            monkeypatch.setattr("megatron_llamapro.checkpoint.tensors.streaming.CHUNK_BYTES", chunk_bytes)
            portions: list[numpy.ndarray] = []
            rows = StoredRows(tensor, files, 2)
            hashes.add(hash_rows(rows, tensor, 2, each=lambda start, part, seen=portions: seen.append(part.copy())))
            assert (numpy.concatenate(portions).view(numpy.uint16) == values).all()
        assert hashes == {stored_hash(tensor, files, 2)}


def test_a_file_cut_changed_or_removed_is_noticed(stored: tuple) -> None:
    _, tensor = stored
    path = tensor.pieces[0].file
    with SourceFiles() as files:
        read_whole(tensor, files, 2)
        files.check_unchanged()
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            files.check_unchanged()
        path.write_bytes(b"short")
        with pytest.raises(CheckpointError, match="shorter than it was"):
            read_whole(tensor, files, 2)
        path.unlink()
        with pytest.raises(CheckpointError, match="vanished"):
            files.check_unchanged()
    with SourceFiles() as files, pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        read_whole(tensor, files, 2)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """Reading it would wait forever."""
    import os

    os.mkfifo(tmp_path / "pipe")
    with SourceFiles() as files, pytest.raises(CheckpointError, match="is not a file"):
        read_whole(whole((2, 2), tmp_path / "pipe", 0), files, 2)
