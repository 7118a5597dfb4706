"""The penalty on what added blocks add has, at any layout, the gradients of plain autograd on transformers' model.

The reference writes the penalty out with torch's operations. 1e-5 relative in float32: sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradients import BATCH, SEQ_LENGTH, batch, gradients_worker, parallel
from megatron_llamapro.config.schema import RecomputeConfig
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.distributed import run_distributed

WEIGHT = 3.0
OUTPUTS = ("o_proj.weight", "down_proj.weight")


def masks() -> dict[str, torch.Tensor]:
    """Return a loss mask that differs between samples, and two known samples of four."""
    drawn = torch.rand(BATCH, SEQ_LENGTH, generator=torch.Generator().manual_seed(1))
    return {"loss_mask": (drawn > 0.3).float(), "known": torch.tensor([True, False, False, True])}


FIELDS = {"all": {"loss_mask": masks()["loss_mask"]}, "known": masks()}


@pytest.fixture(scope="module")
def trained(tiny_llama: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Return a function that makes a model whose added blocks are no identities any more, in both formats."""
    from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron

    made: dict[tuple[int, ...], tuple[Path, Path]] = {}

    def make(*positions: int) -> tuple[Path, Path]:
        if positions not in made:
            folder = tmp_path_factory.mktemp("trained")
            expand_hf(tiny_llama(num_hidden_layers=4), folder / "hf", expansion=Expansion.at(*positions))
            tensors = load_file(folder / "hf" / "model.safetensors")
            for layer in positions:
                for name, tensor in tensors.items():
                    if name.startswith(f"model.layers.{layer}.") and name.endswith(OUTPUTS):
                        source = tensors[name.replace(f"layers.{layer}.", f"layers.{layer - 1 if layer else 1}.")]
                        tensor.copy_(source * 0.5)
            save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
            hf_to_megatron(folder / "hf", folder / "megatron")
            made[positions] = folder / "hf", folder / "megatron"
        return made[positions]

    return make


def reference(
    folder: Path, added: tuple[int, ...], fields: Mapping[str, torch.Tensor], *, weight: float = WEIGHT
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return loss, penalty and the gradients of the added blocks, from transformers and plain autograd."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_: torch.nn.Module, given: tuple, output: torch.Tensor) -> None:
        blocks.append((given[0], output))

    for layer in added:
        model.model.layers[layer].register_forward_hook(note)
    tokens, labels = batch()
    mask = fields["loss_mask"]
    counts = mask * fields["known"][:, None] if "known" in fields else mask
    logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = (losses.view_as(mask) * mask).sum() / mask.sum()
    ratios = [(after - before).square().sum(-1) / before.square().sum(-1).detach() for before, after in blocks]
    penalty = (torch.stack(ratios).mean(0) * counts).sum() / mask.sum()
    (loss + weight * penalty).backward()
    names = tuple(f"model.layers.{layer}." for layer in added)
    gradients = {name: p.grad for name, p in model.named_parameters() if name.startswith(names)}
    return loss.item(), penalty.item(), gradients


def worker(folder: Path, settings: list[dict]) -> list[tuple[tuple, float | None]]:
    """Take a step for each of the settings. Return it, and the penalty."""
    results = []
    for setting in settings:
        sums: list = []
        [step] = gradients_worker(folder, sums_seen=sums, **{"penalty_weight": WEIGHT, **setting})
        results.append((step, sums[0].penalty))
    return results


def check(ranks: list[tuple[tuple, float | None]], expected: tuple, shape_of: Path) -> None:
    """Assert that every rank has the reference's loss and penalty, and all ranks together its gradients."""
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config
    from megatron_llamapro.testing.gather import assembled, under_hf_names

    loss, penalty, gradients = expected
    pieces = assembled(piece for (_, _, of_rank), _ in ranks for piece in of_rank)
    ours = under_hf_names(pieces, model_shape(read_hf_config(shape_of)))
    assert set(ours) == set(gradients)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for (our_loss, our_norm, _), our_penalty in ranks:
        assert (our_loss, our_norm, our_penalty) == pytest.approx((loss, norm, penalty), rel=1e-5)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * norm), name


FULL = RecomputeConfig("full", "uniform", 2)
LAYOUTS = {
    "one process": [
        {"config": parallel()},
        {"config": parallel(), "skip": False},
        {"config": parallel(), "recompute": RecomputeConfig("full", "block", 2)},
        {"config": parallel(), "recompute": RecomputeConfig("selective", modules=("core_attn", "mlp"))},
    ],
    "dp2": [{"config": parallel()}],
    "tp2": [{"config": parallel(tp=2)}, {"config": parallel(tp=2, sp=True)}],
    "pp2": [
        {"config": parallel(pp=2)},  # an added block ends each stage
        {"config": parallel(pp=2), "recompute": FULL},
        {"config": parallel(pp=2, vp=2, stage_layers=(1, 2, 1, 2))},
        {"config": parallel(pp=2, vp=2, stage_layers=(3, 0, 1, 2)), "recompute": FULL},
    ],
    "tp2 pp2": [
        {"config": parallel(tp=2, pp=2)},
        {"config": parallel(tp=2, pp=2, sp=True)},
        {"config": parallel(tp=2, pp=2, sp=True), "recompute": FULL},
    ],
    "pp2 dp2": [{"config": parallel(pp=2)}],
}
NUM_RANKS = {"one process": 1, "tp2 pp2": 4, "pp2 dp2": 4}  # otherwise 2


@pytest.mark.parametrize("positions", [(2, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_plain_autograd(layout: str, positions: tuple[int, ...], trained: Callable) -> None:
    """Of all tokens, and of those from known sources. Micro-batches of one sample, so several are in flight."""
    hf, megatron = trained(*positions)
    settings = [{**one, "fields": fields} for one in LAYOUTS[layout] for fields in FIELDS.values()]
    ranks = run_distributed(worker, NUM_RANKS.get(layout, 2), megatron, settings)
    for number, setting in enumerate(settings):
        check([rank[number] for rank in ranks], reference(hf, positions, setting["fields"]), megatron)
