"""The penalty on what added blocks add has, at any layout, the gradients of plain autograd on transformers' model.

The reference writes the penalty out with torch's operations. 1e-5 relative in float32: sums in another order.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradients import BATCH, SEQ_LENGTH, batch, gradients_worker, parallel
from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import RecomputeConfig
from megatron_llamapro.expansion.plan import ExpansionPlan
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.model.penalty import BlockPenalty, _PenaltyGradient, penalise_added_blocks
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

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


def test_the_penalty_is_a_large_part_of_the_references_gradient(trained: Callable) -> None:
    hf, _ = trained(2, 5)
    (*_, with_it), (*_, without) = (reference(hf, (2, 5), FIELDS["all"], weight=weight) for weight in (WEIGHT, 0.0))
    for name, gradient in with_it.items():
        assert (gradient - without[name]).norm() > 0.1 * without[name].norm(), name


@pytest.mark.parametrize("positions", [(2, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_plain_autograd(layout: str, positions: tuple[int, ...], trained: Callable) -> None:
    """Of all tokens, and of those from known sources. Micro-batches of one sample, so several are in flight."""
    hf, megatron = trained(*positions)
    settings = [{**one, "fields": fields} for one in LAYOUTS[layout] for fields in FIELDS.values()]
    ranks = run_distributed(worker, NUM_RANKS.get(layout, 2), megatron, settings)
    for number, setting in enumerate(settings):
        check([rank[number] for rank in ranks], reference(hf, positions, setting["fields"]), megatron)


def test_upstreams_own_recomputation_carries_the_token_weights(trained: Callable) -> None:
    """Without `skip_frozen_work`: gradients are bit-equal to those without recomputation. The embedding trains, because
    otherwise upstream gives recomputed layers no gradient."""
    _, megatron = trained(2, 5)
    recomputed = [RecomputeConfig(), FULL, RecomputeConfig("full", "block", 3)]
    settings = [
        {
            "config": parallel(),
            "skip": False,
            "recompute": recompute,
            "trainable": ("embedding", "added_blocks"),
            "fields": FIELDS["known"],
        }
        for recompute in recomputed
    ]
    [[(kept, penalty), *others]] = run_distributed(worker, 1, megatron, settings)
    for step, its_penalty in others:
        assert (*step[:2], its_penalty) == (*kept[:2], penalty)
        assert all(torch.equal(ours.data, its.data) for ours, its in zip(step[2], kept[2], strict=True))


def test_token_weights_change_no_routing(models: Callable) -> None:
    """A weight of (almost) 0 changes nothing in a model with experts, whatever tokens count."""
    folder = models(**TINY_FAMILIES["mixtral"]).expanded_megatron
    settings = [{"config": parallel(), "penalty_weight": weight, "fields": FIELDS["known"]} for weight in (0.0, 1e-12)]
    [[(without, nothing), (with_it, penalty)]] = run_distributed(worker, 1, folder, settings)
    assert (nothing, penalty) == (None, 0.0) and with_it[:2] == without[:2]
    assert all(torch.equal(ours.data, its.data) for ours, its in zip(with_it[2], without[2], strict=True))


def test_a_token_whose_stream_is_zero_has_no_penalty() -> None:
    """It has no relative contribution. Other tokens have their gradient, and a weight of 0 leaves a token out."""
    before = torch.randn(3, 1, 8).requires_grad_()
    with torch.no_grad():
        before[0] = 0.0
    after = (before.detach() + 1.0).requires_grad_()
    penalty = BlockPenalty(WEIGHT, num_blocks=2, is_divided=False)
    output = _PenaltyGradient.apply(before, after, torch.tensor([[1.0], [1.0], [0.0]]), penalty)
    output.backward(torch.zeros_like(output))
    expected = WEIGHT / 2 * 2 / before[1].detach().square().sum()  # of every element, whose contribution is 1
    assert torch.allclose(after.grad[:, 0], torch.stack([torch.zeros(8), expected.expand(8), torch.zeros(8)]))
    assert torch.equal(before.grad, -after.grad)
    assert penalty.total.item() == pytest.approx(8 / before[1].detach().square().sum().item())


def test_outputs_that_megatron_core_frees_do_not_share_the_kept_tensor() -> None:
    """`deallocate_output_tensor` refuses a view, and gives a stage's output other bytes."""
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    before, after = (torch.randn(4, 2, 8, requires_grad=True) for _ in range(2))
    gradients = []
    for frees in (False, True):
        penalty = BlockPenalty(WEIGHT, num_blocks=1, is_divided=False)
        output = _PenaltyGradient.apply(before * 1, after * 1, torch.ones(4, 2), penalty)
        before.grad = after.grad = None
        if frees:
            deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
            custom_backward(output, torch.ones(4, 2, 8))
        else:
            output.backward(torch.ones(4, 2, 8))
        gradients.append((before.grad, after.grad))
    assert all(torch.equal(kept, freed) for kept, freed in zip(*gradients, strict=True))


@pytest.mark.parametrize("trainable", [("embedding",), ("final_norm",)])
def test_a_penalty_on_nothing_is_refused(trainable: tuple[str, ...], trained: Callable) -> None:
    _, megatron = trained(2, 5)
    [message] = run_distributed(refused, 1, megatron, trainable)
    assert message.startswith("no added block trains, so there is nothing to penalise")


def test_a_penalty_on_an_fp16_model_is_refused() -> None:
    """Its gradient would not be scaled as the loss is."""
    chunk = types.SimpleNamespace(config=types.SimpleNamespace(fp16=True))
    with pytest.raises(ConfigError, match="needs bf16 or fp32"):
        penalise_added_blocks([chunk], ExpansionPlan.unexpanded(4), weight=1.0, num_blocks=2)


def refused(folder: Path, trainable: tuple[str, ...]) -> str:
    from gradients import load_chunks
    from megatron_llamapro.config.errors import ConfigError

    try:
        load_chunks(folder, parallel(), trainable, penalty_weight=WEIGHT)
    except ConfigError as error:
        return str(error)
    return "no error"
