"""Pairs of token files are checked when they are opened, not when training reads beyond their end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import TOKEN_TYPES, open_token_file, paths_of, read_info


def cut(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - num_bytes)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_missing_file_is_refused(ending: str, copied_pair: Path) -> None:
    Path(f"{copied_pair}{ending}").unlink()
    with pytest.raises(DataError, match="does not exist"):
        open_token_file(copied_pair)


@pytest.mark.parametrize("num_bytes", [1, 2, 1000])
def test_a_cut_bin_file_is_refused(num_bytes: int, copied_pair: Path) -> None:
    cut(paths_of(copied_pair)[0], num_bytes)
    with pytest.raises(DataError, match="do not belong together"):
        open_token_file(copied_pair)


def test_an_index_cut_at_any_length_is_refused(copied_pair: Path) -> None:
    path = paths_of(copied_pair)[1]
    whole = path.read_bytes()
    for length in [*range(0, 60), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"damaged|not an index|no documents"):
            open_token_file(copied_pair)


def test_the_index_of_another_set_is_refused(copied_pair: Path, tmp_path: Path) -> None:
    path = paths_of(copied_pair)[1]
    data = bytearray(path.read_bytes())
    data[17] = 4  # int32 in place of uint16
    path.write_bytes(data)
    with pytest.raises(DataError, match="do not belong together"):
        open_token_file(copied_pair)
    for code in (99, 6, 7):  # 6 and 7 are megatron.core's codes of floating-point numbers
        data[17] = code
        path.write_bytes(data)
        with pytest.raises(DataError, match="not an index"):
            open_token_file(copied_pair)


def test_a_flipped_bit_in_any_byte_of_an_index_is_found(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A bit flipped in any byte is noticed, never read as other tokens or none."""
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "d"}\n{"text": "ef"}\n')
    preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer=tokenizer_folder)
    path = paths_of(tmp_path / "a")[1]
    whole, expected = path.read_bytes(), [sequence.tolist() for sequence in read_all(tmp_path / "a")]
    for place in range(len(whole)):
        for bit in (0, 7):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                sequences = [sequence.tolist() for sequence in read_all(tmp_path / "a")]
            except DataError:
                continue
            assert bit == 0 and place in (len(whole) - 24, len(whole) - 16)  # the start of a document in the middle
            assert sequences == expected


def read_all(prefix: Path) -> list[numpy.ndarray]:
    dataset = open_token_file(prefix)
    return [dataset[index].copy() for index in range(len(dataset))]


def test_a_smaller_vocabulary_is_refused(pair: Path) -> None:
    info = read_info(pair)
    assert info is not None
    open_token_file(pair, vocab_size=info.max_token + 1)
    with pytest.raises(DataError, match="another tokenizer"):
        open_token_file(pair, vocab_size=info.max_token)


def test_the_side_file_of_other_tokens_is_ignored(copied_pair: Path) -> None:
    info = read_info(copied_pair)
    assert info is not None
    dataclasses.replace(info, bin_bytes=info.bin_bytes + 2).write(paths_of(copied_pair)[2])
    assert read_info(copied_pair) is None


def test_token_types_are_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert {each.value: each.name for each in DType if "float" not in each.name and each.name != "int8"} == TOKEN_TYPES
