"""docs/packs.md: its commands, run on a tiny model, do what the page says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pages import commands, run
from safetensors.torch import load_file, save_file

from megatron_llamapro.checkpoint.convert import expand_hf
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.round import Expansion

PAGE = "docs/packs.md"


def make_run(source: Path, folder: Path, seed: int) -> None:
    """Write an export of a run that trained added blocks."""
    expand_hf(source, folder, expansion=Expansion.at(2, 5))
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name in sorted(name for name in tensors if name.startswith(("model.layers.2.", "model.layers.5."))):
        tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_pages_commands_make_a_model_of_two_packs(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama(), tmp_path / "llama-2-7b-hf")
    for seed, name in enumerate(("cpp", "law"), 1):
        make_run(base, tmp_path / "runs" / name, seed)
    first, second, alone, both, look, check = commands(PAGE)
    assert "blocks: 2, 5, copied from 1, 3 of the original" in run(first, tmp_path)
    run(second, tmp_path)
    assert "pack packs/cpp × 1: blocks 2, 5 (round 1)" in run(alone, tmp_path)
    exported, composed = (load_file(tmp_path / name / "model.safetensors") for name in ("runs/cpp", "llama-2-7b-cpp"))
    assert all(torch.equal(composed[name], tensor) for name, tensor in exported.items())
    shown = run(both, tmp_path)
    assert "4 → 8 layers" in shown and "added blocks: 2, 3, 6, 7" in shown
    assert "pack packs/cpp × 0.75: blocks 2, 6 (round 1)\npack packs/law × 1: blocks 3, 7 (round 2)" in shown
    assert "E o o 1 2 o o 1 2 H" in run(look, tmp_path)
    assert "FAIL" not in run(check, tmp_path)
    packs = Manifest.read(tmp_path / "llama-2-7b-both").packs
    assert [(pack.name, pack.scale) for pack in packs] == [("cpp", 0.75), ("law", 1.0)]
