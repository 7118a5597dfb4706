"""Losses of held-out sets equal those of transformers, for every format and layout; so do those along the dial.

Losses: 1e-5 relative, in float32: sums of a few thousand products in another order.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from held_out import NUM_SAMPLES, SEQ_LENGTH, job, samples
from safetensors.torch import load_file, save_file

from gradients import parallel
from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.evaluation.job import EvaluationJob
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES


def evaluate_worker(folders: Mapping[str, Path], settings: EvaluationJob) -> dict[str, tuple[float, int, int]]:
    from megatron_llamapro.checkpoint.formats.open import open_checkpoint
    from megatron_llamapro.evaluation.run import evaluate_each

    checkpoints = {label: open_checkpoint(folder) for label, folder in folders.items()}
    token_files = settings.check([*checkpoints.values()], world_size=torch.distributed.get_world_size())
    found = evaluate_each(checkpoints, settings, token_files)
    return {label: (held["b"].loss, held["b"].num_tokens, held["b"].num_bytes) for label, held in found.items()}


def sweep_worker(
    folder: Path, settings: EvaluationJob, scales: tuple[float, ...], original: Path | None
) -> dict[float, float]:
    from megatron_llamapro.checkpoint.formats.open import open_checkpoint
    from megatron_llamapro.evaluation.run import sweep

    checkpoint = open_checkpoint(folder)
    token_files = settings.check([checkpoint], world_size=torch.distributed.get_world_size())
    before = open_checkpoint(original) if original else None
    along = sweep(checkpoint, settings, token_files, scales=scales, original=before)
    return {scale: losses["b"].loss for scale, losses in along}


def reference_loss(folder: Path, prefix: Path) -> float:
    """Return transformers' mean loss of the evaluated samples."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = samples(prefix)
    with torch.no_grad():
        logits = model(data[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), data[:, 1:].reshape(-1)).item()


@pytest.mark.parametrize("family", ["llama", *TINY_FAMILIES])
def test_every_family_has_the_losses_of_transformers(
    family: str, tiny_model: Callable[..., Path], token_files: tuple[Path, Path]
) -> None:
    folder = tiny_model(num_hidden_layers=4, **TINY_FAMILIES.get(family, {}))
    [found] = run_distributed(evaluate_worker, 1, {"it": folder}, job(token_files[1]))
    loss, num_tokens, _ = found["it"]
    assert math.isclose(loss, reference_loss(folder, token_files[1]), rel_tol=1e-5)
    assert num_tokens == NUM_SAMPLES * SEQ_LENGTH


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, parallel(tp=2)), (2, parallel(pp=2)), (3, parallel()), (4, parallel(tp=2, pp=2))],
    ids=["tp2", "pp2", "dp3", "tp2 pp2"],
)
def test_every_format_and_layout_has_the_same_loss(
    num_ranks: int,
    layout: ParallelConfig,
    models: Callable,
    token_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """An expanded model that is not trained has its original's. Five samples do not fill three replicas evenly."""
    made = models()
    hf_to_megatron(made.original_hf, tmp_path / "legacy", kind=legacy(tensor_model_parallel_size=2))
    folders = {
        "hf": made.original_hf,
        "expanded hf": made.expanded_hf,
        "megatron": made.expanded_megatron,
        "legacy": tmp_path / "legacy",
    }
    first, *others = run_distributed(evaluate_worker, num_ranks, folders, job(token_files[1], parallel=layout))
    assert all(other == first for other in others)
    expected = reference_loss(made.original_hf, token_files[1])
    for loss, num_tokens, _ in first.values():
        assert math.isclose(loss, expected, rel_tol=1e-5) and num_tokens == NUM_SAMPLES * SEQ_LENGTH


def test_experts_are_evaluated_on_two_tensor_parallel_ranks(
    tiny_model: Callable[..., Path], token_files: tuple[Path, Path]
) -> None:
    folder = tiny_model(num_hidden_layers=4, **TINY_FAMILIES["mixtral"])
    first, _ = run_distributed(evaluate_worker, 2, {"it": folder}, job(token_files[1], parallel=parallel(tp=2)))
    assert math.isclose(first["it"][0], reference_loss(folder, token_files[1]), rel_tol=1e-5)


def test_bytes_are_those_of_the_text(models: Callable, token_files: tuple[Path, Path]) -> None:
    """Unknown characters are special tokens, which stand for no bytes."""
    from megatron_llamapro.data.tokenizer import load_tokenizer

    folder = models().original_hf
    [found] = run_distributed(evaluate_worker, 1, {"it": folder}, job(token_files[1]))
    tokenizer = load_tokenizer(folder)
    labels = samples(token_files[1])[:, 1:].reshape(-1)
    text = tokenizer.decode(labels[labels != tokenizer.eod].tolist())
    assert found["it"][2] == len(text.replace("<unk>", "").encode())


@pytest.fixture(scope="module")
def trained(models: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The expanded model as if its added blocks had been trained: their output projections are not zeros."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(models().expanded_hf, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in outputs(tensors):
        tensors[name] = 0.2 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def outputs(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    blocks = ("model.layers.2.", "model.layers.5.")
    return [name for name in tensors if name.startswith(blocks) and ("o_proj" in name or "down_proj" in name)]


@pytest.mark.parametrize(("num_ranks", "layout"), [(1, parallel()), (4, parallel(tp=2, pp=2))], ids=["one", "tp2 pp2"])
def test_a_sweep_has_the_losses_of_scaled_weights(
    num_ranks: int,
    layout: ParallelConfig,
    trained: Path,
    models: Callable,
    token_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """The reference scales the weights itself. The scales go up and down, because each replaces the one before."""
    scales = (1.0, 0.0, 0.5)
    settings = job(token_files[1], parallel=layout)
    found, *_ = run_distributed(sweep_worker, num_ranks, trained, settings, scales, None)
    for scale in scales:
        folder = tmp_path / str(scale)
        shutil.copytree(trained, folder)
        tensors = load_file(folder / "model.safetensors")
        for name in outputs(tensors):
            tensors[name] = scale * tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert math.isclose(found[scale], reference_loss(folder, token_files[1]), rel_tol=1e-5)
    assert math.isclose(found[0.0], reference_loss(models().original_hf, token_files[1]), rel_tol=1e-5)
    assert found[1.0] != found[0.5] != found[0.0]
