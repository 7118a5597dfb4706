"""Opening a checkpoint of any format: statements about it hold for the bytes read later."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_llamapro.checkpoint.convert import (
    TORCH_DIST,
    TargetKind,
    hf_to_megatron,
    legacy,
    megatron_to_hf,
)
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.checkpoint.formats.megatron_tensors import open_megatron
from megatron_llamapro.checkpoint.formats.open import open_checkpoint
from megatron_llamapro.checkpoint.formats.torch_dist import torch_dist_layout
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.families import hf_config as families

Tiny = Callable[..., Path]
KINDS = {"torch_dist": (TORCH_DIST, "torch_dist"), "legacy": (legacy(tensor_model_parallel_size=2), "legacy_reader")}


@pytest.mark.parametrize(("kind", "module"), KINDS.values(), ids=KINDS.keys())
def test_a_file_replaced_after_its_header_was_read_is_refused(
    kind: TargetKind, module: str, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file's offsets mean nothing in the new file."""
    hf_to_megatron(tiny_llama(), tmp_path / "it", kind=kind)
    path = tmp_path / "it" / ("__0_0.distcp" if kind is TORCH_DIST else "release/mp_rank_01/model_optim_rng.pt")

    def replaced(*arguments: Any, **settings: Any) -> Checkpoint:
        shutil.copyfile(path, tmp_path / "new")
        (tmp_path / "new").replace(path)
        return open_megatron(*arguments, **settings)

    monkeypatch.setattr(f"megatron_llamapro.checkpoint.formats.{module}.open_megatron", replaced)
    with pytest.raises(CheckpointError, match=f"{path.name} changed while it was being read"):
        megatron_to_hf(tmp_path / "it", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("format_name", ["hf", *KINDS])
def test_the_configuration_is_read_once(
    format_name: str, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two reads might return two configurations."""
    folder = tiny_llama()
    if format_name in KINDS:
        folder = tmp_path / "it"
        hf_to_megatron(tiny_llama(), folder, kind=KINDS[format_name][0])
    read, seen = families.read_hf_config, []

    def counted(folder: Path) -> dict:
        seen.append(folder)
        return read(folder)

    monkeypatch.setattr(families, "read_hf_config", counted)
    assert open_checkpoint(folder).shape.num_layers == 4
    assert seen == [folder]


@pytest.mark.parametrize("format_name", ["hf", *KINDS])
def test_an_error_about_a_configuration_names_its_folder(format_name: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    """Verification opens two folders."""
    folder = tmp_path / "it"
    if format_name in KINDS:
        hf_to_megatron(tiny_llama(), folder, kind=KINDS[format_name][0])
    else:
        shutil.copytree(tiny_llama(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match=r"^/.*/it: config\.json has hidden_size 'wide'"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no config\.json: .*copy the model's config\.json"):
        open_checkpoint(folder)


FEW_OPEN_FILES = """
import resource, sys
from pathlib import Path
from megatron_llamapro.checkpoint.proof.verify import verify
resource.setrlimit(resource.RLIMIT_NOFILE, (30, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print([str(check) for check in verify(Path(sys.argv[1]), Path(sys.argv[2]), quick=True)])
"""


def test_a_checkpoint_may_have_more_files_than_may_be_open(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Hundreds of ranks save so many; the usual limit is 1024."""
    kind = TargetKind(partial(torch_dist_layout, max_file_bytes=1))
    hf_to_megatron(tiny_llama(), tmp_path / "it", kind=kind)
    assert len(list((tmp_path / "it").glob("*.distcp"))) > 30
    command = [sys.executable, "-c", FEW_OPEN_FILES, str(tiny_llama()), str(tmp_path / "it")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "39 original tensors match their hash" in ended.stdout


def grow(path: Path) -> None:
    """Extend a file by a hole, which takes no disk space."""
    os.truncate(path, 64 * 2**30)


def claim_a_large_directory(path: Path) -> None:
    """Make the end of a zip file place its directory a kilobyte after the start of the file."""
    grow(path)
    end, start = path.stat().st_size, 1000
    tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, end - start, start)
    tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with path.open("ab") as file:
        file.write(tail)


HOLES = {
    "config.json": ("torch_dist", "config.json", grow),
    "manifest": ("torch_dist", "llamapro.json", grow),
    "index of torch_dist": ("torch_dist", ".metadata", grow),
    "tracker": ("legacy", "latest_checkpointed_iteration.txt", grow),
    "a rank's file": ("legacy", "release/mp_rank_01/model_optim_rng.pt", grow),
    "a rank's directory": ("legacy", "release/mp_rank_01/model_optim_rng.pt", claim_a_large_directory),
    "index of shards": ("hf", "model.safetensors.index.json", grow),
    "tokenizer": ("hf", "tokenizer.json", grow),
}
LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from megatron_llamapro.checkpoint.convert import expand_hf, megatron_to_hf
from megatron_llamapro.config.command import run_command
from megatron_llamapro.expansion.round import Expansion
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
source, target = map(Path, sys.argv[2:])
if sys.argv[1] == "hf":
    run_command(lambda: expand_hf(source, target, expansion=Expansion.at(1)) and 0)
run_command(lambda: megatron_to_hf(source, target) and 0)
"""


@pytest.mark.parametrize(("format_name", "name", "damage"), HOLES.values(), ids=HOLES.keys())
def test_a_small_file_of_64_gigabytes_is_refused(
    format_name: str, name: str, damage: Callable, tiny_llama: Tiny, tmp_path: Path
) -> None:
    """All but its start is a hole; the file is neither read into memory nor copied."""
    folder = tmp_path / "it"
    if format_name == "hf":
        shutil.copytree(tiny_llama(max_shard_size="50KB"), folder)
    else:
        hf_to_megatron(tiny_llama(), folder, kind=KINDS[format_name][0])
    damage(folder / name)
    command = [sys.executable, "-c", LITTLE_MEMORY, format_name, str(folder), str(tmp_path / "target")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"error: {folder / name} ")
    assert damage is grow or "a directory of absurd size" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]
