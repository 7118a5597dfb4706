"""Which checkpoint folder a path resolves to, and what is never read from it: links that leave it, and pipes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy, megatron_to_hf
from megatron_llamapro.checkpoint.formats.folders import latest_checkpoint, resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError

Tiny = Callable[..., Path]


def names(folder: Path) -> list[str]:
    """Return every name in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def training_run(folder: Path, source: Path, *iterations: int) -> Path:
    """Make a training run's folder with untrained checkpoints."""
    for iteration in iterations:
        hf_to_megatron(source, folder / f"iter_{iteration:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{iterations[-1]}\n")
    return folder


def test_a_run_folder_resolves_to_its_newest_checkpoint(tiny_llama: Tiny, tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", tiny_llama(), 10, 20)
    assert resolve_megatron_checkpoint(run) == latest_checkpoint(run) == run / "iter_0000020"
    assert resolve_megatron_checkpoint(run / "iter_0000010") == run / "iter_0000010"
    megatron_to_hf(run, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_a_release_folder_resolves_to_itself(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Megatron-LM reads this folder: docs/other_tools.md."""
    hf_to_megatron(tiny_llama(), tmp_path / "it" / "release")
    (tmp_path / "it" / "latest_checkpointed_iteration.txt").write_text("release")
    assert resolve_megatron_checkpoint(tmp_path / "it") == tmp_path / "it" / "release"
    assert inspect(tmp_path / "it").shape.num_layers == 4
    megatron_to_hf(tmp_path / "it", tmp_path / "back")
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "back", quick=True))


def test_training_refuses_a_legacy_checkpoint(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "it", kind=legacy())
    for folder in (tmp_path / "it", tmp_path / "it" / "release"):
        with pytest.raises(CheckpointError, match=r"release is a legacy checkpoint.*megatron-to-megatron"):
            resolve_megatron_checkpoint(folder)


BAD_LATEST = {"text": "soon", "negative": "-1", "empty": "", "digits of another script": "٣", "not there": "30"}


@pytest.mark.parametrize("text", BAD_LATEST.values(), ids=BAD_LATEST.keys())
def test_a_tracker_file_that_names_no_checkpoint_is_refused(text: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", tiny_llama(), 10)
    (run / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt"):
        resolve_megatron_checkpoint(run)


def test_a_folder_without_a_megatron_checkpoint_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a Megatron checkpoint: it has no metadata\.json"):
        resolve_megatron_checkpoint(tiny_llama())
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        resolve_megatron_checkpoint(tmp_path / "nowhere")


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, damaged: Tiny, tmp_path: Path) -> None:
    """Otherwise an export could publish a private key behind a tokenizer.json link."""
    source = damaged()
    outside = tmp_path / "outside"
    (source / name).rename(outside)
    link(source, name, outside)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        hf_to_megatron(source, tmp_path / "it")
    assert names(tmp_path) == ["damaged", "outside"]


def test_a_loop_of_links_is_refused(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    link(source, "model.safetensors", source / "other")
    link(source, "other", source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be opened") as refusal:
        hf_to_megatron(source, tmp_path / "it")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pipe_is_refused_without_waiting(name: str, damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        hf_to_megatron(source, tmp_path / "it")
