"""Every damaged Hugging Face checkpoint is refused in one line, before anything is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llamapro.checkpoint.convert import TORCH_DIST, TargetKind, hf_to_megatron, legacy
from megatron_llamapro.checkpoint.formats.hf_reader import open_hf
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.testing.checkpoints import read_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    """Edit a safetensors header; its sizes and offsets need not match the file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def claim_petabytes(header: dict) -> None:
    header[UP]["shape"] = [10**9, 10**6]
    header[UP]["data_offsets"][1] = header[UP]["data_offsets"][0] + 4 * 10**15


def overlap(header: dict) -> None:
    header[UP]["data_offsets"] = header["model.norm.weight"]["data_offsets"]


ONE_FILE = {
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(UP)), f"lacks the tensor {UP}"),
    "a tensor of the wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({UP: torch.zeros(3, 64)})),
        rf"{UP} has shape \(3, 64\), but config.json makes it \(96, 64\)",
    ),
    "a tensor that no row reads": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)})),
        r"has the tensor model\.layers\.0\.mlp\.up_proj\.bias",
    ),
    "more layers than config.json has": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(64)})),
        r"has the tensor model\.layers\.4",
    ),
    "mixed types": (lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].half()})), "mixes types"),
    "a type that is not supported": (
        lambda f: edit_tensors(f, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()})),
        "stored as F8_E4M3: only F32, BF16, F16",
    ),
    "a truncated file": (lambda f: truncate(f / SINGLE), "truncated or not a safetensors file"),
    "an empty file": (lambda f: (f / SINGLE).write_bytes(b""), "truncated or not a safetensors file"),
    "a file of something else": (lambda f: (f / SINGLE).write_bytes(b"PK" * 500), "truncated or not"),
    "a header longer than the file": (
        lambda f: (f / SINGLE).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "truncated or not",
    ),
    "a header that claims petabytes": (
        lambda f: edit_header(f / SINGLE, claim_petabytes),
        "truncated or not",
    ),
    "tensors that overlap": (lambda f: edit_header(f / SINGLE, overlap), "truncated or not"),
    "a tensor's name of two lines": (
        lambda f: edit_tensors(f, lambda t: t.update({"model\nerror: ok": torch.ones(1)})),
        r"names a tensor 'model\\nerror: ok': it is damaged",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), f"no {SINGLE} and no {INDEX}"),
    "weights in pickles only": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        "only pytorch_model.*save it as safetensors first",
    ),
    "a config for more layers": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "num_hidden_layers": 5})
        ),
        r"lacks the tensor model\.layers\.4\.",
    ),
}

SEVERAL_FILES = {
    "a missing shard": (lambda f: (f / shard_names(f)[1]).unlink(), "lacks the shard model-00002-of-"),
    "a truncated shard": (lambda f: truncate(f / shard_names(f)[2]), "model-00003-of-.*truncated"),
    "an index that names a file elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({UP: "../model.safetensors"})),
        "names the shard '../model.safetensors'",
    ),
    "an index that names an absolute path": (
        lambda f: edit_index(f, lambda m: m.update({UP: "/dev/zero"})),
        "names the shard '/dev/zero'",
    ),
    "an index that names the wrong shard": (
        lambda f: edit_index(f, lambda m: m.update({UP: m["lm_head.weight"]})),
        f"lacks the tensor {UP}",
    ),
    "an index with a number for a name": (
        lambda f: edit_index(f, lambda m: m.update({UP: 3})),
        "names the shard 3",
    ),
    "an index that is no index": (lambda f: (f / INDEX).write_text("[1, 2]"), "not an index"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), "not an index"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), "not an index"),
}

CASES = {
    **{k: (*v, {}) for k, v in ONE_FILE.items()},
    **{k: (*v, {"max_shard_size": "50KB"}) for k, v in SEVERAL_FILES.items()},
}


@pytest.mark.parametrize(("damage", "message", "settings"), CASES.values(), ids=CASES.keys())
def test_a_damaged_checkpoint_is_refused_in_one_line(
    damage: Callable, message: str, settings: dict, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = damaged(**settings)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        hf_to_megatron(folder, tmp_path / "target")
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_several_shards_read_as_one(tiny_llama: Callable[..., Path]) -> None:
    one, several = open_hf(tiny_llama()), open_hf(tiny_llama(max_shard_size="50KB"))
    assert len(shard_names(several.folder)) > 3
    assert one.weight_bytes == several.weight_bytes
    assert torch.equal(read_tensors(one.folder)[UP], read_tensors(several.folder)[UP])


@pytest.mark.parametrize("kind", [TORCH_DIST, legacy()], ids=["torch_dist", "legacy"])
def test_a_megatron_checkpoint_is_recognised(kind: TargetKind, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "it", kind=kind)
    with pytest.raises(CheckpointError, match="it is a Megatron checkpoint: megatron-to-hf and megatron-to-megatron"):
        hf_to_megatron(tmp_path / "it", tmp_path / "target")


def test_a_manifest_with_another_layer_count_is_refused(damaged: Callable[..., Path], tmp_path: Path) -> None:
    hf_to_megatron(damaged(), tmp_path / "megatron")
    manifest = json.loads((tmp_path / "megatron" / "llamapro.json").read_text())
    manifest["plan"]["layers"].pop()
    (tmp_path / "damaged" / "llamapro.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest has 3 layers, but its config\.json has 4"):
        open_hf(tmp_path / "damaged")
