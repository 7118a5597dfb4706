"""Any layout computes the same as transformers and as the unexpanded model.

Gradients and losses: 1e-5 relative, logits 1e-4, in float32: sums of a few thousand products in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gradients import batch, gradients_worker, load_chunks, parallel
from megatron_llamapro.config.schema import ParallelConfig
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

ADDED = ("model.layers.2.", "model.layers.5.")


LAYOUTS = {
    "one process": (1, parallel()),
    "tp2": (2, parallel(tp=2)),
    "tp2 sequence parallel": (2, parallel(tp=2, sp=True)),
    "pp2": (2, parallel(pp=2)),
    "pp2 virtual 2": (2, parallel(pp=2, vp=2)),
    "tp2 pp2 sequence parallel": (4, parallel(tp=2, pp=2, sp=True)),
    "dp2": (2, parallel()),
}


def logits_worker(folders: list[Path], config: ParallelConfig) -> list[torch.Tensor | None]:
    from megatron_llamapro.testing.gather import whole_logits

    results = []
    for folder in folders:
        _, shape, chunks = load_chunks(folder, config)
        results.append(whole_logits(chunks, batch()[0], vocab_size=shape.vocab_size))
    return results


def hf_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


LLAMAS = {
    "gqa": {},
    "mha tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3 rope, head_dim, epsilon": {
        "head_dim": 32,
        "rms_norm_eps": 0.05,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dp2"])
@pytest.mark.parametrize("llama", LLAMAS)
def test_expanded_logits_equal_the_originals_and_transformers(llama: str, layout: str, models: Callable) -> None:
    made = models(**LLAMAS[llama])
    world_size, config = LAYOUTS[layout]
    ranks = run_distributed(logits_worker, world_size, [made.original_megatron, made.expanded_megatron], config)
    check_logits(made, *ranks[-1])


def check_logits(made, original: torch.Tensor, expanded: torch.Tensor) -> None:
    """Assert that expanded and original are bit-equal, and equal to transformers."""
    assert torch.equal(original, expanded)
    with torch.no_grad():
        reference = hf_model(made.original_hf)(batch()[0]).logits
        assert torch.equal(reference, hf_model(made.expanded_hf)(batch()[0]).logits)
    assert reference.std() > 0.1
    torch.testing.assert_close(expanded, reference, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Reference:
    """The results of transformers, under the names that checkpoints store."""

    loss: float
    gradients: dict[str, torch.Tensor]


def transformers_reference(folder: Path, only: tuple[str, ...] = ("",)) -> Reference:
    """Return loss and gradients of the parameters whose names start with one of `only`."""
    model = hf_model(folder)
    tokens, labels = batch()
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n.startswith(only)}
    return Reference(loss.item(), dict(stored for item in gradients.items() for stored in as_stored(*item)))


def as_stored(name: str, gradient: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield an expert tensor's parts: transformers 5 holds Mixtral's experts in two tensors but stores each alone."""
    block, _, rest = name.partition(".mlp.")
    if rest == "gate.weight":
        yield f"{block}.block_sparse_moe.gate.weight", gradient
    elif rest.startswith("experts."):
        names = ("w1", "w3") if rest == "experts.gate_up_proj" else ("w2",)
        for expert, both in enumerate(gradient):
            for part, values in zip(names, both.chunk(len(names)), strict=True):
                yield f"{block}.block_sparse_moe.experts.{expert}.{part}.weight", values
    else:
        yield name, gradient


@pytest.fixture(scope="module")
def reference(models: Callable):
    """Return transformers' loss and gradients of the added blocks."""
    made = models()
    return made, transformers_reference(made.expanded_hf, ADDED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_transformers(layout: str, reference) -> None:
    made, expected = reference
    world_size, config = LAYOUTS[layout]
    ranks = run_distributed(gradients_worker, world_size, made.expanded_megatron, config)
    check_first_step(made, expected, [steps[0] for steps in ranks])


def check_first_step(made, expected: Reference, ranks: list[tuple]) -> None:
    """Assert that every rank has transformers' loss and gradient norm, and all ranks together its gradients."""
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.testing.gather import assembled, under_hf_names

    shape = model_shape(read_hf_config(made.expanded_megatron))
    ours = under_hf_names(assembled(piece for _, _, pieces in ranks for piece in pieces), shape)
    assert set(ours) == set(expected.gradients)
    norm = torch.stack([g.norm() for g in expected.gradients.values()]).norm().item()
    for loss, grad_norm, _ in ranks:
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        assert grad_norm == pytest.approx(norm, rel=1e-5)
    for name, gradient in expected.gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * norm), name


def family_worker(original: Path, expanded: Path, config: ParallelConfig):
    """Return logits of both models, one step that trains the added blocks, and one that trains everything."""
    logits = logits_worker([original, expanded], config)
    steps = [gradients_worker(expanded, config, 1, trainable)[0] for trainable in (("added_blocks",), ("everything",))]
    return logits, steps


@pytest.mark.parametrize("layout", ["one process", "tp2 pp2 sequence parallel"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_equals_transformers(family: str, layout: str, models: Callable) -> None:
    """Logits and gradients. In an identity block only the zeroed projections have gradients, so a second step trains
    everything: norms of queries and keys, biases, routers."""
    made = models(**TINY_FAMILIES[family])
    world_size, config = LAYOUTS[layout]
    ranks = run_distributed(family_worker, world_size, made.original_megatron, made.expanded_megatron, config)
    check_logits(made, *ranks[-1][0])
    for number, only in enumerate((ADDED, ("",))):
        check_first_step(made, transformers_reference(made.expanded_hf, only), [steps[number] for _, steps in ranks])


def test_only_zeroed_projections_have_gradients_at_first(reference) -> None:
    """Paper, section 3.2: nothing reaches the rest of an identity block before its output projections move."""
    from megatron_llamapro.testing.gather import assembled

    made, _ = reference
    [steps] = run_distributed(gradients_worker, 1, made.expanded_megatron, parallel(), 2)
    first, second = (assembled(pieces) for _, _, pieces in steps)
    for name, gradient in first.items():
        assert bool(gradient.any()) == name.endswith(("linear_proj.weight", "linear_fc2.weight")), name
    assert len(second) == 12 and all(gradient.any() for gradient in second.values())
