"""Scores of blocks equal those of transformers, which removes a layer, or looks at its input and output.

1e-5 relative, in float32: sums of a few thousand products in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from held_out import job, samples

from gradients import parallel
from megatron_llamapro.checkpoint.convert import hf_to_megatron, legacy
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.evaluation.job import EvaluationJob
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Scores = tuple[list[float], list[float]]
"""Losses without each block, and changes of the stream."""


def score_worker(folder: Path, settings: EvaluationJob) -> Scores:
    from megatron_llamapro.checkpoint.formats.open import open_checkpoint
    from megatron_llamapro.evaluation.blocks import score_blocks

    checkpoint = open_checkpoint(folder)
    token_files = settings.check([checkpoint], world_size=torch.distributed.get_world_size())
    scores = score_blocks(checkpoint, settings, token_files)["b"]
    return [scores.whole.loss + increase for increase in scores.left_out], list(scores.stream_change)


def reference(folder: Path, prefix: Path) -> Scores:
    """Return transformers' scores."""
    data = samples(prefix)
    model = load(folder)
    changes: list[float] = []

    def note(_: torch.nn.Module, given: tuple, output: torch.Tensor) -> None:
        before, after = given[0].double(), output.double()
        changes.append(((after - before).square().sum(-1) / before.square().sum(-1)).mean().sqrt().item())

    for layer in model.model.layers:
        layer.register_forward_hook(note)
    loss_of(model, data)
    return [loss_of(without(load(folder), block), data) for block in range(len(changes))], changes


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def without(model: torch.nn.Module, block: int) -> torch.nn.Module:
    """Remove a layer, and its entries in the configuration."""
    del model.model.layers[block]
    model.config.num_hidden_layers -= 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for i, kind in enumerate(model.config.layer_types) if i != block]
    return model


def loss_of(model: torch.nn.Module, data: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(data[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), data[:, 1:].reshape(-1)).item()


def assert_equal(found: Scores, expected: Scores) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", *TINY_FAMILIES])
def test_every_family_has_the_scores_of_transformers(
    family: str, tiny_model: Callable[..., Path], token_files: tuple[Path, Path]
) -> None:
    folder = tiny_model(num_hidden_layers=4, **TINY_FAMILIES.get(family, {}))
    [found] = run_distributed(score_worker, 1, folder, job(token_files[1]))
    assert_equal(found, reference(folder, token_files[1]))


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, parallel(tp=2)), (2, parallel(pp=2)), (3, parallel()), (4, parallel(tp=2, pp=2))],
    ids=["tp2", "pp2", "dp3", "tp2 pp2"],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_layout_has_the_same_scores(
    family: str,
    num_ranks: int,
    layout: ParallelConfig,
    tiny_model: Callable[..., Path],
    token_files: tuple[Path, Path],
) -> None:
    """Five samples do not fill three replicas evenly. Experts on two tensor-parallel ranks divide the sequence."""
    folder = tiny_model(num_hidden_layers=4, **TINY_FAMILIES.get(family, {}))
    first, *others = run_distributed(score_worker, num_ranks, folder, job(token_files[1], parallel=layout))
    assert all(other == first for other in others)
    assert_equal(first, reference(folder, token_files[1]))


def test_a_stage_of_one_block_can_be_left_out(tiny_model: Callable[..., Path], token_files: tuple[Path, Path]) -> None:
    folder = tiny_model(num_hidden_layers=2)
    first, _ = run_distributed(score_worker, 2, folder, job(token_files[1], parallel=parallel(pp=2)))
    assert_equal(first, reference(folder, token_files[1]))


def test_every_format_has_the_same_scores(models: Callable, token_files: tuple[Path, Path], tmp_path: Path) -> None:
    made = models()
    hf_to_megatron(made.original_hf, tmp_path / "legacy", kind=legacy(tensor_model_parallel_size=2))
    expected = reference(made.original_hf, token_files[1])
    for folder in (made.original_megatron, tmp_path / "legacy"):
        [found] = run_distributed(score_worker, 1, folder, job(token_files[1], micro_batch_size=2))
        assert_equal(found, expected)


def test_blocks_of_an_expanded_model_are_scored_too(models: Callable, token_files: tuple[Path, Path]) -> None:
    """Untrained added blocks, 2 and 5, change nothing."""
    made = models()
    [(losses, changes)] = run_distributed(score_worker, 1, made.expanded_megatron, job(token_files[1]))
    assert_equal((losses, changes), reference(made.expanded_hf, token_files[1]))
    whole = loss_of(load(made.original_hf), samples(token_files[1]))
    for added in (2, 5):
        assert changes[added] == 0.0 and losses[added] == pytest.approx(whole, rel=1e-5)
