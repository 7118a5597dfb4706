"""The mean of a run's checkpoints. The reference is torch's mean of the files as torch or safetensors reads them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import workers
from megatron_llamapro.checkpoint.average import average
from megatron_llamapro.checkpoint.convert import TORCH_DIST, megatron_to_hf
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.schema import LoraConfig, RunConfig
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.testing.checkpoints import read_tensors, read_with_torch
from megatron_llamapro.testing.distributed import run_distributed


def steps_of(run: Path) -> list[Path]:
    return sorted(run.glob("iter_*"))


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def mean_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)


@pytest.fixture(scope="module")
def runs(models: Callable, token_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Return a function that trains three steps, each saved, and returns the run's folder. Do not change its files."""
    made: dict[str, Path] = {}

    def make(make_config: Callable[..., RunConfig], *, delta: bool = True, lora: LoraConfig | None = None, **fields):
        key = repr((delta, lora, fields))
        if key not in made:
            config = make_config(train_iters=3, **fields)
            folder = tmp_path_factory.mktemp("runs") / "first"
            changed = dataclasses.replace(config.checkpoint, save=str(folder), save_interval=1, delta=delta)
            config = dataclasses.replace(config, checkpoint=changed, lora=lora or config.lora)
            run_distributed(workers.train, 1, config)
            made[key] = folder
        return made[key]

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_tensors_are_means_and_frozen_ones_the_bases(
    dtype: str, runs: Callable, run_config: Callable, models: Callable, tmp_path: Path
) -> None:
    run = runs(run_config, dtype=dtype)
    average(steps_of(run), tmp_path / "mean", kind=TORCH_DIST)
    base, *deltas = map(read_with_torch, [models(dtype=dtype).expanded_megatron, *steps_of(run)])
    trained = [name for name in deltas[0] if not name.startswith("optimizer.")]
    found = read_with_torch(tmp_path / "mean")
    assert len(trained) == 2 * 6 and found.keys() == base.keys()
    for name, tensor in found.items():
        expected = mean_of([each[name] for each in deltas]) if name in trained else base[name]
        assert same_bytes(tensor, expected), name
    moved = [name for name in trained if not same_bytes(found[name], deltas[-1][name])]
    assert len(moved) > 6


def test_an_export_has_the_means_and_says_what_was_averaged(
    runs: Callable, run_config: Callable, models: Callable, tmp_path: Path
) -> None:
    run = runs(run_config, dtype="float32")
    exports = []
    for step in steps_of(run)[1:]:
        megatron_to_hf(step, tmp_path / step.name)
        exports.append(load_file(tmp_path / step.name / "model.safetensors"))
    done = average(reversed(steps_of(run)[1:]), tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert found.keys() == exports[0].keys()
    assert all(same_bytes(tensor, mean_of([each[name] for each in exports])) for name, tensor in found.items())
    records = Manifest.read(tmp_path / "mean").averaged
    assert [(each.name, each.iteration) for each in records] == [("first/iter_0000002", 2), ("first/iter_0000003", 3)]
    assert len({each.hash for each in records}) == 2
    config = json.loads((tmp_path / "mean" / "config.json").read_text())
    assert config["llamapro"]["averaged"][0]["name"] == "first/iter_0000002"
    assert done.num_bytes == sum(tensor.nbytes for tensor in found.values())
    assert all(check.ok for check in verify(models().original_hf, tmp_path / "mean"))
    assert "mean of" in str(inspect(tmp_path / "mean"))


def test_the_mean_goes_on_as_any_checkpoint(runs: Callable, run_config: Callable, tmp_path: Path) -> None:
    """It trains, and an export of that run still says what was averaged."""
    average(steps_of(runs(run_config, dtype="float32")), tmp_path / "mean", kind=TORCH_DIST)
    config = run_config(train_iters=1, checkpoint=tmp_path / "mean")
    run_distributed(workers.train, 1, config)
    megatron_to_hf(Path(config.checkpoint.save), tmp_path / "export")
    assert len(Manifest.read(tmp_path / "export").averaged) == 3


def test_adapters_are_averaged_as_merged_weights(runs: Callable, run_config: Callable, tmp_path: Path) -> None:
    run = runs(run_config, dtype="float32", trainable=("lora",), lora=LoraConfig(rank=2))
    average(steps_of(run), tmp_path / "mean")
    merged = [read_tensors(step) for step in steps_of(run)]
    found = load_file(tmp_path / "mean" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.allclose(tensor, mean_of([each[name] for each in merged]), rtol=1e-6, atol=0), name
    adapted, frozen = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    assert not same_bytes(found[adapted], merged[-1][adapted])
    assert same_bytes(found[frozen], merged[-1][frozen])


def test_a_full_checkpoints_frozen_tensors_keep_their_bits(
    runs: Callable, run_config: Callable, models: Callable, tmp_path: Path
) -> None:
    """Three times a float32 number, divided by 3, may be another number."""
    run = runs(run_config, dtype="float32", delta=False)
    average(steps_of(run), tmp_path / "mean", kind=TORCH_DIST)
    base, found = read_with_torch(models().expanded_megatron), read_with_torch(tmp_path / "mean")
    embedding = base["embedding.word_embeddings.weight"]
    assert not same_bytes(mean_of([embedding] * 3), embedding)
    assert same_bytes(found["embedding.word_embeddings.weight"], embedding)
    delta = runs(run_config, dtype="float32")
    average(steps_of(delta), tmp_path / "mean of deltas", kind=TORCH_DIST)
    others = read_with_torch(tmp_path / "mean of deltas")
    assert all(same_bytes(tensor, others[name]) for name, tensor in found.items())


def test_checkpoints_that_do_not_belong_together_are_refused(
    runs: Callable, run_config: Callable, models: Callable, tiny_llama: Callable, tmp_path: Path
) -> None:
    first = steps_of(runs(run_config, dtype="float32"))
    other_base = tmp_path / "other" / "iter_0000009"
    shutil.copytree(first[0], other_base)
    (other_base.parent / "base").symlink_to(first[0].parent / "base")
    for name, field in (("llamapro_delta.json", "base_hashes"), ("llamapro.json", "original_hashes")):
        record = json.loads((first[0] / name).read_text())
        record[field]["model.norm.weight"] = "0" * 64
        (other_base / name).write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=r"not have the same (base|original model): average"):
            average([first[0], other_base], tmp_path / "mean")
        shutil.copy(first[0] / name, other_base)
    bfloat16 = steps_of(runs(run_config, dtype="bfloat16"))
    parts = steps_of(runs(run_config, dtype="float32", trainable=("added_blocks", "embedding")))
    full = steps_of(runs(run_config, dtype="float32", delta=False))
    refused = {
        "a mean needs two checkpoints or more": first[:1],
        "is given twice: name each checkpoint once": [first[2], first[0], first[0].parent],
        "not have the same type: average checkpoints of one run": [first[0], bfloat16[0]],
        "not have the same trainable part: average": [first[0], parts[0]],
        "have the same trainable part: average": [first[0], full[0]],
        "not have the same family and shape: average": [first[0], models().original_megatron],
        "is not a Megatron checkpoint": [first[0], models().expanded_hf],
    }
    for line, checkpoints in refused.items():
        with pytest.raises(CheckpointError, match=line) as refusal:
            average(checkpoints, tmp_path / "mean")
        assert "\n" not in str(refusal.value)
    for target in (first[0], first[0].parent / "base"):
        with pytest.raises(CheckpointError, match="overlap"):
            average(first[:2], target)
    assert not any(path.name.startswith(("mean", ".mean")) for path in tmp_path.iterdir())


def test_a_lost_base_is_noticed(runs: Callable, run_config: Callable, models: Callable, tmp_path: Path) -> None:
    shutil.copytree(runs(run_config, dtype="float32"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "base")
    with pytest.raises(CheckpointError, match="base must hold the others, but does not exist"):
        average(steps_of(tmp_path / "run"), tmp_path / "mean")
