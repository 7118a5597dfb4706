"""The dial of real runs, delta and full: exports equal plain torch arithmetic on what torch and safetensors read."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import workers
from megatron_llamapro.checkpoint.convert import DialSetting, megatron_to_hf, megatron_to_megatron
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.schema import LoraConfig, RunConfig
from megatron_llamapro.testing.checkpoints import read_with_torch
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.gather import under_hf_names

Tensors = dict[str, torch.Tensor]
OUTPUT = re.compile(r"model\.layers\.[25]\..*(o_proj|down_proj)\.weight")


@pytest.fixture
def trained(run_config: Callable) -> Callable[..., RunConfig]:
    """Finish a run of two steps."""

    def make(*, delta: bool, lora: LoraConfig | None = None, **settings: object) -> RunConfig:
        config = run_config(**{"train_iters": 2, **settings})
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, delta=delta))
        if lora:
            config = dataclasses.replace(config, lora=lora)
        run_distributed(workers.train, 1, config)
        return config

    return make


def last_of(config: RunConfig) -> Path:
    return sorted(Path(config.checkpoint.save).glob("iter_*"))[-1]


def weights_of_run(config: RunConfig) -> Tensors:
    """Return the weights that torch reads, under Hugging Face's names; adapters merged in float32."""
    from megatron_llamapro.families.hf_config import model_shape, read_hf_config

    start = Path(config.model.checkpoint)
    held = {**read_with_torch(start), **read_with_torch(last_of(config))}
    for name in [name for name in held if name.endswith(".lora_a") and not name.startswith("optimizer.")]:
        stem = name.removesuffix(".lora_a")
        added = config.lora.scaling * held[f"{stem}.lora_b"].float() @ held[name].float()
        held[f"{stem}.weight"] = (held[f"{stem}.weight"].float() + added).to(held[f"{stem}.weight"].dtype)
    shape = model_shape(read_hf_config(start))
    return under_hf_names({name: held[name] for name in read_with_torch(start)}, shape)


def expected(config: RunConfig, start: Tensors, scale: float) -> Tensors:
    def at(name: str, after: torch.Tensor) -> torch.Tensor:
        before = start[name]
        if OUTPUT.fullmatch(name):
            before = torch.zeros_like(after)
        elif re.match(r"model\.layers\.[25]\.", name):
            return after
        moved = (before.float() + scale * (after.float() - before.float())).to(after.dtype)
        return torch.where(after == before, before, moved)

    return {name: at(name, tensor) for name, tensor in weights_of_run(config).items()}


RUNS = {
    "added blocks": {"trainable": ("added_blocks",)},
    "embedding and added blocks": {"trainable": ("added_blocks", "embedding")},
    "everything": {"trainable": ("everything",)},
    "only the final norm": {"trainable": ("final_norm",)},
    "lora": {"trainable": ("lora",), "lora": LoraConfig(rank=3, alpha=6.0)},
    "low-rank blocks": {"trainable": ("lora",), "lora": LoraConfig(rank=3, blocks="added_blocks")},
    "adapters on trained weights": {"trainable": ("everything", "lora"), "lora": LoraConfig(rank=3, blocks="all")},
}
KINDS = {"delta": ("float32", True), "full": ("float32", False), "bfloat16": ("bfloat16", True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", RUNS)
def test_a_run_is_dialed(what: str, kind: str, trained: Callable, models: Callable, tmp_path: Path) -> None:
    """A delta needs no --original: its base has the values. Where nothing was adapted, bits are equal."""
    dtype, delta = KINDS[kind]
    original = models(dtype=dtype).original_hf
    config = trained(delta=delta, dtype=dtype, **RUNS[what])
    trains_originals = what in ("embedding and added blocks", "only the final norm")
    is_needed = "everything" in RUNS[what]["trainable"] or (trains_originals and not delta)
    given = original if is_needed else None
    if is_needed:
        with pytest.raises(CheckpointError, match="give --original, the model before training"):
            megatron_to_hf(last_of(config), tmp_path / "refused", dial=DialSetting(0.5))
    start = load_file(models(dtype=dtype).expanded_hf / "model.safetensors")
    for scale in (0.5, 0):
        folder = tmp_path / str(scale)
        megatron_to_hf(last_of(config), folder, dial=DialSetting(scale, given))
        found, wanted = load_file(folder / "model.safetensors"), expected(config, start, scale)
        assert found.keys() == wanted.keys()
        rtol = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] if config.lora.rank else 0
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=rtol / 100)
        assert any(not torch.equal(found[name], start[name]) for name in found) or scale == 0
        checks = {check.name: check for check in verify(original, folder, undialed=last_of(config))}
        assert all(check.ok for check in checks.values()) and "dial" in checks, checks
    tokens = torch.arange(3, 43)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(each)(tokens).logits for each in (original, tmp_path / "0"))
    assert torch.equal(one, other)


def test_a_delta_is_dialed_to_megatron(trained: Callable, tmp_path: Path) -> None:
    """The other run that starts from it has the record, and its base is checked as before."""
    config = trained(delta=True)
    megatron_to_hf(last_of(config), tmp_path / "hf", dial=DialSetting((0.25, 0.5)))
    megatron_to_megatron(last_of(config), tmp_path / "megatron", dial=DialSetting((0.25, 0.5)), dtype="float32")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    [weights] = Path(config.checkpoint.save, "base").glob("*.distcp")
    replaced = shutil.copyfile(weights, tmp_path / "copy")
    with replaced.open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(b"\1" * 4_000)
    weights.unlink()
    shutil.copyfile(replaced, weights)
    with pytest.raises(CheckpointError, match="is not the tensor that the run trained with"):
        megatron_to_hf(last_of(config), tmp_path / "refused", dial=DialSetting(0.5))


def test_what_an_earlier_run_trained_is_dialed_too(trained: Callable, models: Callable, tmp_path: Path) -> None:
    """The second run trained only the final norm. Its base holds the embedding and the blocks of the first run."""
    first = trained(delta=True, save="first", trainable=("added_blocks", "embedding"))
    megatron_to_megatron(last_of(first), tmp_path / "start")
    second = trained(delta=True, save="second", checkpoint=tmp_path / "start", trainable=("final_norm",))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight and 1 more was trained"):
        megatron_to_hf(last_of(second), tmp_path / "dialed", dial=DialSetting(0.5))
    original, start = models().original_hf, load_file(models().expanded_hf / "model.safetensors")
    megatron_to_hf(last_of(second), tmp_path / "dialed", dial=DialSetting(0.5, original))
    found, wanted = load_file(tmp_path / "dialed" / "model.safetensors"), expected(second, start, 0.5)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    checks = verify(original, tmp_path / "dialed", undialed=last_of(second))
    assert [check.name for check in checks if not check.ok] == []


def test_a_base_that_was_trained_is_not_the_original(trained: Callable, models: Callable, tmp_path: Path) -> None:
    """A run that first saved full checkpoints made its base from one of them."""
    settings = {"trainable": ("embedding",), "train_iters": 4}
    trained(delta=False, exit_interval=2, **settings)
    config = trained(delta=True, **settings)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight was trained, .* give --original"):
        megatron_to_hf(last_of(config), tmp_path / "dialed", dial=DialSetting(0.5))
    megatron_to_hf(last_of(config), tmp_path / "dialed", dial=DialSetting(0, models().original_megatron))
    found = load_file(tmp_path / "dialed" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found, load_file(models().original_hf / "model.safetensors")["model.embed_tokens.weight"])


def test_another_scale_of_adapters_is_found(trained: Callable, models: Callable, tmp_path: Path) -> None:
    config = trained(delta=True, **RUNS["lora"])
    megatron_to_hf(last_of(config), tmp_path / "dialed", dial=DialSetting(0.5))
    path = tmp_path / "dialed" / "llamapro.json"
    text = path.read_text()
    for scale in ("0.4", "0.6"):
        path.write_text(text.replace('"added_block_scale": 0.5', f'"added_block_scale": {scale}'))
        found = {check.name: check for check in verify(models().original_hf, path.parent, undialed=last_of(config))}
        assert not found["dial"].ok and f"is not × {scale} of" in found["dial"].text
