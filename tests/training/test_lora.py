"""Low-rank adapters: their gradients are those of W + scaling * B A computed by hand. New adapters change nothing,
checkpoints resume at any layout, and an export has merged weights.

Losses and gradients: 1e-5 relative in float32, because the sums have another order.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import workers
from gradients import batch, gradients_worker, load_chunks, parallel
from megatron_llamapro.checkpoint.convert import megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.schema import LoraConfig, ParallelConfig, RunConfig
from megatron_llamapro.testing.checkpoints import read_tensors, read_with_torch
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.gather import assembled, under_hf_names

ALL = LoraConfig(rank=4, alpha=6.0, blocks="all")
SOME = LoraConfig(rank=3, targets=("linear_qkv", "linear_fc2"))
LOW_RANK_BLOCKS = LoraConfig(rank=4, blocks="added_blocks")

LAYOUTS = {
    "one process": (1, parallel()),
    "tp2": (2, parallel(tp=2)),
    "tp2 sequence parallel": (2, parallel(tp=2, sp=True)),
    "pp2 virtual 2": (2, parallel(pp=2, vp=2)),
    "tp2 pp2 sequence parallel": (4, parallel(tp=2, pp=2, sp=True)),
    "dp2": (2, parallel()),
}


def _sharded(chunks: list):
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megatron_llamapro.training.checkpoints.state import model_state

    for state in model_state(chunks).values():
        for held in state.values():
            yield from held.build() if isinstance(held, ShardedTensorFactory) else [held]


def fill_b(chunks: list) -> None:
    """Fill every B, initially zero, with values that do not depend on the layout."""
    for held in _sharded(chunks):
        if held.key.endswith(".lora_b"):
            generator = torch.Generator().manual_seed(sum(held.key.encode()))
            whole = torch.randn(held.global_shape, generator=generator) * 0.1
            place = zip(held.global_offset, held.local_shape, strict=True)
            with torch.no_grad():
                held.data.copy_(whole[tuple(slice(start, start + size) for start, size in place)])


def adapters_worker(folder: Path, lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Return every tensor of the model on one rank, with filled adapters, under megatron.core's keys."""
    from megatron_llamapro.testing.gather import RankPiece

    _, _, chunks = load_chunks(folder, parallel(), ("lora",), lora=lora, after_loading=fill_b)
    return assembled(
        RankPiece(held.key, held.global_shape, held.global_offset, held.data.detach().clone())
        for held in _sharded(chunks)
    )


def by_hand(folder: Path, hf: Path, tensors: dict[str, torch.Tensor], scaling: float):
    """Return loss and adapter gradients of transformers' model with W + scaling * B A as its weights."""
    from transformers import AutoModelForCausalLM

    from megatron_llamapro.families.hf_config import model_shape, read_hf_config

    adapters = {key: value.clone().requires_grad_() for key, value in tensors.items() if ".lora_" in key}
    merged = {
        key: value + scaling * adapters[f"{key[:-7]}.lora_b"] @ adapters[f"{key[:-7]}.lora_a"]
        for key, value in tensors.items()
        if f"{key.removesuffix('.weight')}.lora_a" in adapters
    }
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokens, labels = batch()
    values = under_hf_names(merged, model_shape(read_hf_config(folder)))
    logits = torch.func.functional_call(model, values, (tokens,)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item(), {key: value.grad for key, value in adapters.items()}


@pytest.fixture(scope="module")
def reference(models: Callable) -> Callable:
    made: dict[LoraConfig, tuple] = {}

    def of(lora: LoraConfig) -> tuple[float, dict[str, torch.Tensor]]:
        if lora not in made:
            ours = models()
            [tensors] = run_distributed(adapters_worker, 1, ours.expanded_megatron, lora)
            made[lora] = by_hand(ours.expanded_megatron, ours.expanded_hf, tensors, lora.scaling)
        return made[lora]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [ALL, SOME, LOW_RANK_BLOCKS], ids=["all", "some", "low rank"])
def test_gradients_equal_those_computed_by_hand(
    lora: LoraConfig, layout: str, models: Callable, reference: Callable
) -> None:
    expected_loss, expected = reference(lora)
    world_size, config = LAYOUTS[layout]
    worker = functools.partial(gradients_worker, lora=lora, after_loading=fill_b)
    ranks = run_distributed(worker, world_size, models().expanded_megatron, config, 1, ("lora",))
    for [(loss, norm, _)] in ranks:
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        whole = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt().item()
        assert norm == pytest.approx(whole, rel=1e-5)
    found = assembled(piece for [(_, _, pieces)] in ranks for piece in pieces)
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values()).item()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}")


def logits_worker(folder: Path, config: ParallelConfig) -> list[torch.Tensor | None]:
    """Return logits without adapters, with new ones, and with filled ones."""
    from megatron_llamapro.testing.gather import whole_logits

    found = []
    for options in ({}, {"lora": ALL}, {"lora": ALL, "after_loading": fill_b}):
        _, shape, chunks = load_chunks(folder, config, **options)
        found.append(whole_logits(chunks, batch()[0], vocab_size=shape.vocab_size))
    return found


@pytest.mark.parametrize("layout", ["one process", "tp2 pp2 sequence parallel"])
def test_new_adapters_change_nothing(layout: str, models: Callable) -> None:
    world_size, config = LAYOUTS[layout]
    without, new, filled = run_distributed(logits_worker, world_size, models().expanded_megatron, config)[-1]
    assert torch.equal(without, new) and not torch.equal(new, filled)


# Runs of the program.

TP2_PP2 = parallel(tp=2, pp=2, sp=True)


def with_lora(config: RunConfig, lora: LoraConfig, **checkpoint: object) -> RunConfig:
    return dataclasses.replace(
        config,
        lora=lora,
        model=dataclasses.replace(config.model, trainable=("lora",)),
        checkpoint=dataclasses.replace(config.checkpoint, **checkpoint),
    )


def last_of(config: RunConfig) -> Path:
    return sorted(Path(config.checkpoint.save).glob("iter_*"))[-1]


def run(config: RunConfig, ranks: int = 1) -> list[tuple]:
    return run_distributed(workers.train, ranks, config)[0].figures


@pytest.fixture
def trained(run_config: Callable) -> Callable[..., RunConfig]:
    def make(lora: LoraConfig = ALL, ranks: int = 1, *, delta: bool = True, **settings: object) -> RunConfig:
        config = with_lora(run_config(**{"train_iters": 2, **settings}), lora, delta=delta)
        run(config, ranks)
        return config

    return make


def merged_by_hand(folder: Path, start: Path, shape, scaling: float) -> dict[str, torch.Tensor]:
    """Return the weights of `start` merged with the adapters of a run's checkpoint, under Hugging Face's names."""
    adapters, weights = read_with_torch(folder), read_with_torch(start)
    return under_hf_names(
        {
            key: value + scaling * adapters[f"{key[:-7]}.lora_b"] @ adapters[f"{key[:-7]}.lora_a"]
            if f"{key.removesuffix('.weight')}.lora_a" in adapters
            else value
            for key, value in weights.items()
        },
        shape,
    )


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "full"])
def test_an_export_has_merged_weights(delta: bool, trained: Callable, tmp_path: Path, models: Callable) -> None:
    """To the last bit but one of float32, because the product is computed in portions. Weights without adapters are
    unchanged."""
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config

    start = models().expanded_megatron
    config = trained(SOME, 4, parallel=TP2_PP2, delta=delta)
    assert "adapters        8 low-rank" in str(inspect(last_of(config)))
    done = megatron_to_hf(last_of(config), tmp_path / "hf")
    assert done.num_merged == 2 * 4  # two linears in each of four original blocks
    expected = merged_by_hand(last_of(config), start, model_shape(read_hf_config(start)), SOME.scaling)
    before, after = read_tensors(start), read_tensors(tmp_path / "hf")
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    adapted = re.compile(r"model\.layers\.[0134]\..*(q_proj|k_proj|v_proj|down_proj)\.weight")
    assert moved == {name for name in after if adapted.fullmatch(name)}
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    megatron_to_megatron(last_of(config), tmp_path / "merged")
    again = read_tensors(tmp_path / "merged")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_a_delta_holds_only_adapters(trained: Callable) -> None:
    folder = last_of(trained(LOW_RANK_BLOCKS))
    weights = {key for key in read_with_torch(folder) if "optimizer." not in key}
    assert len(weights) == 2 * 4 * 2 and all(".lora_" in key for key in weights)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "full"])
def test_a_run_resumes_at_another_layout(delta: bool, run_config: Callable) -> None:
    whole = with_lora(run_config(save="whole"), ALL)
    begun = with_lora(run_config(exit_interval=2), ALL, delta=delta)
    expected, first = run(whole), run(begun)
    moved = dataclasses.replace(
        begun, parallel=TP2_PP2, training=dataclasses.replace(begun.training, exit_interval=None)
    )
    assert first + run(moved, 4) == [pytest.approx(row, rel=1e-5) for row in expected]


def test_a_full_checkpoint_resumes_as_a_delta(run_config: Callable) -> None:
    """Its base then holds the weights that the adapters were trained with, not merged ones."""
    whole = with_lora(run_config(save="whole"), ALL)
    begun = with_lora(run_config(exit_interval=2), ALL, delta=False)
    expected, first = run(whole), run(begun)
    delta = dataclasses.replace(
        begun,
        checkpoint=dataclasses.replace(begun.checkpoint, delta=True),
        training=dataclasses.replace(begun.training, exit_interval=None),
    )
    assert first + run(delta) == [pytest.approx(row, rel=1e-6) for row in expected]
    one, other = read_tensors(last_of(whole)), read_tensors(last_of(delta))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_verify_names_weights_changed_by_adapters(trained: Callable, models: Callable, tmp_path: Path) -> None:
    original = models().original_hf
    for lora, kept in ((SOME, False), (LOW_RANK_BLOCKS, True)):
        config = trained(lora, save=lora.blocks)
        exported = tmp_path / f"{lora.blocks} exported"
        megatron_to_hf(last_of(config), exported)
        for folder in (last_of(config), exported):
            checks = {check.name: check for check in verify(original, folder)}
            assert checks["lineage"].ok and checks["original tensors"].ok is kept, checks
            assert checks["added blocks"].ok and ("trained" in checks["added blocks"].text) is kept
            if folder == last_of(config):
                assert checks["base"].ok


def test_a_new_run_does_not_drop_adapters(trained: Callable, run_config: Callable, tmp_path: Path) -> None:
    done = last_of(trained())
    anew = run_config(save="anew", checkpoint=done)
    [[message]] = run_distributed(workers.set_up_errors, 1, [anew])
    assert "has low-rank adapters beside its weights" in message and "megatron-to-megatron" in message
    megatron_to_megatron(done, tmp_path / "merged")
    [[message]] = run_distributed(workers.set_up_errors, 1, [run_config(save="anew", checkpoint=tmp_path / "merged")])
    assert message == "no error"


def test_resuming_with_other_adapters_is_refused(trained: Callable) -> None:
    config = trained()
    other = dataclasses.replace(config, lora=dataclasses.replace(ALL, alpha=7.0))
    [[message]] = run_distributed(workers.set_up_errors, 1, [other])
    assert "started with lora" in message and "'alpha': 6.0" in message


def test_diagnostics_see_the_merged_blocks(run_config: Callable, models: Callable) -> None:
    """Compared with figures computed by hand from the exported weights."""
    config = with_lora(run_config(train_iters=2), LOW_RANK_BLOCKS)
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, diagnostics_interval=2))
    [result] = run_distributed(workers.train, 1, config)
    after, before = read_tensors(last_of(config)), read_tensors(models().expanded_megatron)
    for record in result.blocks:
        outputs = [f"model.layers.{{}}.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")]
        source = {2: 1, 5: 4}[record["layer"]]
        norms = [
            torch.stack([tensors[name.format(layer)].square().sum() for name in outputs]).sum().sqrt()
            for tensors, layer in ((after, record["layer"]), (before, source))
        ]
        assert record["output_norm"] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-5) and norms[0] > 0
        assert record["distance"] > 0 and record["grad_norm"] > 0


def test_a_damaged_adapter_record_is_refused(trained: Callable) -> None:
    folder = last_of(trained())
    record = folder / "llamapro_lora.json"
    text = record.read_text()
    for damage, message in (
        ("", "is damaged"),
        (text.replace('"rank": 4', '"rank": 5'), "must be float32"),
        (text.replace('"alpha": 6.0', '"alpha": -1'), "is damaged"),
        (text.replace('"format_version": 1', '"format_version": 2'), "this version reads 1"),
    ):
        record.write_text(damage)
        with pytest.raises(CheckpointError, match=message):
            read_tensors(folder)
    record.unlink()
    with pytest.raises(CheckpointError, match=r"has adapters but no llamapro_lora\.json"):
        read_tensors(folder)
