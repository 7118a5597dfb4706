"""Reading and writing: sources that change meanwhile, failing disks, memory and workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.convert import (
    Options,
    expand_hf,
    hf_to_megatron,
)
from megatron_llamapro.checkpoint.formats.hf_writer import hf_layout
from megatron_llamapro.checkpoint.tensors.transfer import TargetFiles
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.families.hf_config import model_shape

Tiny = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_shard_that_grows_while_it_is_read_is_noticed(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()

    def change(num_bytes: int) -> None:
        with (source / "model.safetensors").open("ab") as file:
            file.write(b"x")

    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was being read"):
        hf_to_megatron(source, tmp_path / "it", options=Options(progress=change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 1000)], ids=["vanishes", "shrinks"])
def test_a_shard_that_shrinks_or_vanishes_while_it_is_read_is_noticed(
    change: Callable, damaged: Tiny, tmp_path: Path
) -> None:
    source = damaged()
    todo = [source / "model.safetensors"]

    def once(num_bytes: int) -> None:
        if todo:
            change(todo.pop())

    with pytest.raises(CheckpointError, match=r"vanished|shorter than it was"):
        hf_to_megatron(source, tmp_path / "it", options=Options(progress=once))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_disk_that_returns_other_bytes_is_noticed(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flip one bit of the bytes read back."""
    original = TargetFiles.read

    def read(self: TargetFiles, path: Path, offset: int, out: memoryview) -> None:
        original(self, path, offset, out)
        if offset > 100_000:
            out[0] ^= 1

    monkeypatch.setattr(TargetFiles, "read", read)
    with pytest.raises(CheckpointError, match="was read back with other bytes: check the machine"):
        hf_to_megatron(tiny_llama(), tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_noticed_before_writing(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("megatron_llamapro.checkpoint.writing.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 561 kB, but its disk has 1 kB free: make room"):
        hf_to_megatron(tiny_llama(), tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_workers_changes_nothing(tiny_llama: Tiny, tmp_path: Path) -> None:
    for workers in (1, 3, 8):
        options = Options(num_workers=workers)
        expand_hf(tiny_llama(), tmp_path / str(workers), expansion=Expansion.at(2, 5), options=options)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == contents(tmp_path / "8")


def test_added_zeros_take_no_disk_space(tiny_llama: Tiny, tmp_path: Path) -> None:
    """They are holes in the file; nothing is written."""
    source = tiny_llama(hidden_size=512, num_attention_heads=4, intermediate_size=512, vocab_size=131)
    expand_hf(source, tmp_path / "it", expansion=Expansion.at(4, 5, 6, 7))
    status = (tmp_path / "it" / "model.safetensors").stat()
    zeros = 4 * (512 * 512 + 512 * 512) * 4
    assert status.st_blocks * 512 < status.st_size - zeros * 0.9


def test_a_shard_replaced_before_it_is_read_is_noticed(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Its header is read at the start, its tensors last."""
    source = shutil.copytree(tiny_llama(max_shard_size="50KB"), tmp_path / "source")
    other = tiny_llama(max_shard_size="50KB", seed=1)
    last = sorted(path.name for path in source.glob("*.safetensors"))[-1]
    todo = [last]

    def replace(num_bytes: int) -> None:
        if todo:
            shutil.copyfile(other / last, source / "new")
            (source / "new").replace(source / todo.pop())

    with pytest.raises(CheckpointError, match=f"{last} changed while it was being read"):
        hf_to_megatron(source, tmp_path / "it", options=Options(num_workers=1, progress=replace))
    assert not (tmp_path / "it").exists()


CONVERT_AND_MEASURE = """
import sys
from pathlib import Path
from megatron_llamapro.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_llamapro.expansion.round import Expansion
hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), expansion=Expansion.at(1), options=Options(num_workers=2))
megatron_to_hf(Path(sys.argv[2]), Path(sys.argv[3]), options=Options(num_workers=2))
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


def test_memory_does_not_grow_with_the_model(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A model of 340 MB in tensors of 67 MB takes hardly more memory than one of 200 kB. It is all zeros, in a hole."""
    large = tmp_path / "large"
    shutil.copytree(tiny_llama(num_hidden_layers=1), large)
    config = json.loads((large / "config.json").read_text())
    config |= {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 32768, "head_dim": 16}
    (large / "config.json").write_text(json.dumps(config))
    (file,) = hf_layout(large, model_shape(config), "float32").files
    with file.path.open("wb") as written:
        written.truncate(file.num_bytes)
        for offset, content in file.fixed:
            written.seek(offset)
            written.write(content)
    peaks = []
    for source in (tiny_llama(num_hidden_layers=1), large):
        targets = (tmp_path / f"{source.name}-megatron", tmp_path / f"{source.name}-hf")
        command = [sys.executable, "-c", CONVERT_AND_MEASURE, str(source), *map(str, targets)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024)
    assert file.num_bytes > 300 * 2**20
    assert peaks[1] - peaks[0] < 30 * 2**20
