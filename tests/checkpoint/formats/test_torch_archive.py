"""Files of torch.save: torch loads the archives we write, and we find the tensors in the archives it saves."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_llamapro.checkpoint.formats.torch_archive import (
    ArchivedTensor,
    DamagedArchiveError,
    archive_layout,
    read_archive,
    tensor_call,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_torch_loads_our_archives(dtype: str, shape: tuple, tmp_path: Path) -> None:
    tensors = [torch.randn(shape).to(DTYPES[dtype]), torch.randn(2, 2).to(DTYPES[dtype])]
    described = {str(i): tensor_call(str(i), dtype, tuple(t.shape)) for i, t in enumerate(tensors)}
    layout = archive_layout({"model": described, "iteration": 3}, [t.nbytes for t in tensors])
    data = bytearray(layout.num_bytes)
    for offset, part in layout.fixed:
        data[offset : offset + len(part)] = part
    for offset, tensor in zip(layout.tensor_offsets, tensors, strict=True):
        assert offset % 64 == 0
        data[offset : offset + tensor.nbytes] = raw(tensor)
    (tmp_path / "file.pt").write_bytes(data)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "file.pt", weights_only=True, **options)
        assert loaded["iteration"] == 3
        for i, tensor in enumerate(tensors):
            assert loaded["model"][str(i)].dtype == tensor.dtype
            assert torch.equal(loaded["model"][str(i)], tensor)


def test_archives_beyond_four_gigabytes_load(tmp_path: Path) -> None:
    """Sizes and offsets exceed 32 bits; the file is sparse."""
    big = 2**32 + 1024
    described = [tensor_call("0", "bfloat16", (big // 2,)), tensor_call("1", "float32", (3,))]
    layout = archive_layout(described, [big, 12])
    with (tmp_path / "file.pt").open("wb") as file:
        file.truncate(layout.num_bytes)
        for offset, part in layout.fixed:
            file.seek(offset)
            file.write(part)
        file.seek(layout.tensor_offsets[1])
        file.write(raw(torch.tensor([1.0, 2.0, 3.0])))
    large, small = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)
    assert large.shape == (big // 2,) and not large[-1000:].any()
    assert torch.equal(small, torch.tensor([1.0, 2.0, 3.0]))
    with (tmp_path / "file.pt").open("rb") as file:
        found = read_archive(file)
    assert [tensor.offset for tensor in found] == list(layout.tensor_offsets)


def saved(value: object, *, crc: bool = True) -> io.BytesIO:
    file = io.BytesIO()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    torch.save(value, file)
    torch.serialization.set_crc32_options(before)
    return file


@pytest.mark.parametrize("crc", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_find_the_tensors_torch_saves(dtype: str, crc: bool) -> None:
    storage = torch.randn(40).to(DTYPES[dtype])
    value = {
        "whole": storage,
        "rows of a larger one": storage.view(8, 5)[2:4],
        "parameter": torch.nn.Parameter(torch.randn(2, 3).to(DTYPES[dtype])),
        "in a list": [torch.zeros(1, dtype=DTYPES[dtype]), "text"],
        "counts": torch.arange(3),
    }
    file = saved(value, crc=crc)
    found = read_archive(file)
    for name in ("whole", "rows of a larger one", "parameter"):
        place = found[name]
        assert (place.dtype, place.shape) == (dtype, tuple(value[name].shape))
        assert file.getbuffer()[place.offset :][: value[name].nbytes] == raw(value[name].detach())
    assert found["in a list"][1] == "text"
    assert found["counts"].dtype == "other"


def test_a_tensor_that_is_not_row_major_is_refused() -> None:
    with pytest.raises(DamagedArchiveError, match="not row-major"):
        read_archive(saved(torch.randn(4, 6).t()))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_hostile_file_runs_no_code(tmp_path: Path) -> None:
    with pytest.raises(DamagedArchiveError, match="it asks for "):
        read_archive(saved({"a": torch.zeros(1), "b": Hostile(tmp_path / "ran")}))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_an_archive_is_refused() -> None:
    for data in (b"", b"PK", b"x" * 1000):
        with pytest.raises(DamagedArchiveError):
            read_archive(io.BytesIO(data))


def test_any_damage_raises_one_kind_of_error() -> None:
    """Change every byte of the directory and the pickle in turn, and cut the file at every length."""
    whole = saved({"a": torch.arange(4, dtype=torch.float32)}).getvalue()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        for data in (bytes(damaged), whole[:position]):
            try:
                found = read_archive(io.BytesIO(data))
            except DamagedArchiveError as error:
                assert "\n" not in str(error)
            else:
                for tensor in found.values() if isinstance(found, dict) else ():
                    assert not isinstance(tensor, ArchivedTensor) or tensor.offset + 16 <= len(whole)


def zipped(*records: tuple[str, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records:
            archive.writestr(name, data)
    return file


BENIGN = b"\x80\x02}."


def test_we_check_the_record_that_torch_would_read(tmp_path: Path) -> None:
    """Two traps: a pickle before the archive, which torch reads instead, and another record whose name ends in
    data.pkl."""
    evil = pickle.dumps(Hostile(tmp_path / "ran"))
    for file in (
        io.BytesIO(evil + zipped(("archive/data.pkl", BENIGN)).getvalue()),
        zipped(("archive/benign_data.pkl", BENIGN), ("archive/data.pkl", evil)),
        zipped(("archive/data.pkl", evil), ("other/data.pkl", BENIGN)),
    ):
        with pytest.raises(DamagedArchiveError):
            read_archive(file)
    assert list(tmp_path.iterdir()) == []


def test_shared_containers_are_walked_once() -> None:
    """Sixty lists, each twice in the next: copying every reference would make 2**60 copies."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    assert read_archive(zipped(("archive/data.pkl", pickle.dumps(value, protocol=2)))) is not None


ODD = {
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))tR.",
    "a parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_malformed_descriptions_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedArchiveError):
        read_archive(zipped(("archive/data.pkl", data)))
