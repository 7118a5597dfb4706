"""The dial, W0 + scale * (W1 - W0): files equal plain torch arithmetic on what transformers and safetensors load."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_llamapro.checkpoint.convert import (
    DialSetting,
    Options,
    expand_hf,
    hf_to_hf,
    hf_to_megatron,
    megatron_to_hf,
    megatron_to_megatron,
)
from megatron_llamapro.checkpoint.dial import Dial, dialed
from megatron_llamapro.checkpoint.formats.open import OpenTensors, open_checkpoint
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.report import summary
from megatron_llamapro.checkpoint.tensors.streaming import SourceFiles
from megatron_llamapro.config.errors import CheckpointError, ConfigError, ExpansionError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_tensors
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
ADDED = (2, 5)
TOKENS = torch.arange(3, 43)[None]
OUTPUT = re.compile(r"model\.layers\.(2|5)\..*(o_proj|down_proj|w2)\.(weight|bias)")


def in_added_block(name: str) -> bool:
    return re.match(r"model\.layers\.(2|5)\.", name) is not None


def in_source(name: str) -> str:
    """model.layers.3.… → model.layers.2.…: the name in the model of four layers."""
    layer = re.match(r"model\.layers\.(\d+)", name)
    return name if layer is None else name.replace(layer[0], f"model.layers.{[0, 1, None, 2, 3][int(layer[1])]}", 1)


def move(folder: Path, moves: Callable[[str], bool]) -> Tensors:
    """Add noise to these tensors of a Hugging Face checkpoint, as training would. Return all of its tensors."""
    generator, path = torch.Generator().manual_seed(1), folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if moves(name):
            tensor += (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def blend(before: torch.Tensor, after: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 0:
        return before
    return (before.float() + scale * (after.float() - before.float())).to(after.dtype)


def multiplied(after: torch.Tensor, scale: float) -> torch.Tensor:
    return (after.float() * scale).to(after.dtype) if scale else torch.zeros_like(after)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


@pytest.fixture
def trained(tiny_model: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path, Tensors]]:
    """Expand a tiny model and move some tensors: its original, the trained model, and the tensors of that."""

    def make(moves: Callable[[str], bool] = in_added_block, **settings: object) -> tuple[Path, Path, Tensors]:
        original, folder = tiny_model(**settings), tmp_path / "trained"
        expand_hf(original, folder, expansion=Expansion.at(*ADDED))
        return original, folder, move(folder, moves)

    return make


@pytest.fixture
def everything(tiny_model: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path, Tensors]]:
    """Move all tensors of a tiny model without added blocks: its original, the trained model, and the tensors."""

    def make(**settings: object) -> tuple[Path, Path, Tensors]:
        original, folder = tiny_model(**settings), tmp_path / "everything"
        hf_to_megatron(original, tmp_path / "start")
        megatron_to_hf(tmp_path / "start", folder)
        return original, folder, move(folder, lambda name: True)

    return make


@pytest.mark.parametrize(
    "settings",
    [{"dtype": "bfloat16"}, {"dtype": "float32"}, TINY_FAMILIES["mixtral"], TINY_FAMILIES["llama, biases"]],
    ids=["bfloat16", "float32", "mixtral", "biases"],
)
@pytest.mark.parametrize("scale", [0.0, 0.5, 0.7, 1.25, (0.3, 1.0)], ids=str)
def test_output_projections_of_added_blocks_are_multiplied(
    scale: float | tuple[float, ...], settings: dict, trained: Callable, tmp_path: Path
) -> None:
    _, folder, tensors = trained(**settings)
    scales = dict(zip("25", scale if isinstance(scale, tuple) else (scale, scale), strict=True))
    expected = {
        name: multiplied(tensor, scales[output[1]]) if (output := OUTPUT.fullmatch(name)) else tensor
        for name, tensor in tensors.items()
    }
    assert len([name for name in tensors if OUTPUT.fullmatch(name)]) >= 4
    hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(scale))
    assert_same(load_file(tmp_path / "dialed" / "model.safetensors"), expected)


def test_the_way_and_the_format_do_not_matter(trained: Callable, tmp_path: Path) -> None:
    _, folder, _ = trained(dtype="bfloat16")
    dial = DialSetting(0.75)
    hf_to_hf(folder, tmp_path / "hf", dial=dial)
    hf_to_megatron(folder, tmp_path / "megatron")
    hf_to_megatron(folder, tmp_path / "dialed megatron", dial=dial)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "from megatron", dial=dial)
    megatron_to_megatron(tmp_path / "megatron", tmp_path / "again", dial=dial)
    megatron_to_hf(tmp_path / "dialed megatron", tmp_path / "later")
    expected = read_tensors(tmp_path / "hf")
    for name in ("dialed megatron", "from megatron", "again", "later"):
        assert_same(read_tensors(tmp_path / name), expected)
        assert Manifest.read(tmp_path / name) == Manifest.read(tmp_path / "hf")


def test_at_0_it_computes_what_the_original_does(trained: Callable, tmp_path: Path) -> None:
    original, folder, _ = trained(lambda name: True)
    assert not torch.equal(logits(folder), logits(original))
    hf_to_hf(folder, tmp_path / "off", dial=DialSetting(0, original))
    assert torch.equal(logits(tmp_path / "off"), logits(original))


def test_at_1_it_is_the_checkpoint_itself(trained: Callable, tmp_path: Path) -> None:
    _, folder, _ = trained()
    hf_to_hf(folder, tmp_path / "plain")
    hf_to_hf(folder, tmp_path / "one", dial=DialSetting((1, 1.0)))
    for file in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "one" / file.name).read_bytes() == file.read_bytes()
    checkpoint = open_checkpoint(folder)
    assert Dial.of(checkpoint).at(1).tensors is checkpoint.tensors and not dialed(checkpoint, 1).dialed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 1.0])
def test_trained_originals_move_back(scale: float, dtype: str, everything: Callable, tmp_path: Path) -> None:
    original, folder, tensors = everything(dtype=dtype)
    before = load_file(original / "model.safetensors")
    hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(scale, original))
    expected = {name: tensor if scale == 1 else blend(before[name], tensor, scale) for name, tensor in tensors.items()}
    assert_same(load_file(tmp_path / "dialed" / "model.safetensors"), expected)


@pytest.mark.parametrize("kind", ["hf", "megatron", "expanded"])
def test_the_original_may_have_any_format(kind: str, trained: Callable, tmp_path: Path) -> None:
    """Embedding and added blocks were trained, and one original tensor of a block."""
    names = ("model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight")
    original, folder, tensors = trained(lambda name: name in names or in_added_block(name))
    before = load_file(original / "model.safetensors")
    hf_to_megatron(original, tmp_path / "megatron")
    expand_hf(original, tmp_path / "expanded", expansion=Expansion.at(0))
    given = {"hf": original}.get(kind, tmp_path / kind)
    hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(0.5, given))
    expected = {
        name: multiplied(tensor, 0.5)
        if OUTPUT.fullmatch(name)
        else blend(before[in_source(name)], tensor, 0.5)
        if name in names
        else tensor
        for name, tensor in tensors.items()
    }
    assert_same(read_tensors(tmp_path / "dialed"), expected)


def test_originals_of_another_type_are_cast_as_they_were(tiny_model: Tiny, tmp_path: Path) -> None:
    """The float32 original was cast when it was expanded, or when other software saved it in bfloat16."""
    original = tiny_model()
    before = {name: tensor.bfloat16() for name, tensor in load_file(original / "model.safetensors").items()}
    expand_hf(original, tmp_path / "early", expansion=Expansion.at(*ADDED), dtype="bfloat16")
    expand_hf(original, tmp_path / "float32", expansion=Expansion.at(*ADDED))
    AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "late")
    for name in ("early", "late"):
        tensors = move(tmp_path / name, lambda name: True)
        hf_to_hf(tmp_path / name, tmp_path / f"{name} dialed", dial=DialSetting(0.5, original))
        found = read_tensors(tmp_path / f"{name} dialed")
        for name in found:
            if not in_added_block(name):
                assert same_bits(found[name], blend(before[in_source(name)], tensors[name], 0.5))


def test_untouched_originals_need_no_original(trained: Callable, tmp_path: Path) -> None:
    original, folder, _ = trained()
    hf_to_hf(folder, tmp_path / "without", dial=DialSetting(0.5))
    hf_to_hf(folder, tmp_path / "with", dial=DialSetting(0.5, original))
    assert_same(read_tensors(tmp_path / "with"), read_tensors(tmp_path / "without"))
    assert Manifest.read(tmp_path / "with") == Manifest.read(tmp_path / "without")


def test_equal_bits_stay_equal(trained: Callable, tmp_path: Path) -> None:
    """Rows that were not trained, -0.0 among them, stay as they are."""
    original, folder, _ = trained(in_added_block)
    negative = load_file(original / "model.safetensors")
    negative["model.norm.weight"][3] = -0.0
    source = tmp_path / "negative"
    source.mkdir()
    for file in original.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    save_file(negative, source / "model.safetensors", metadata={"format": "pt"})
    expand_hf(source, folder, expansion=Expansion.at(*ADDED), options=Options(overwrite=True))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(0.5, source))
    expected = tensors["model.norm.weight"].clone()
    expected[5] = negative["model.norm.weight"][5] + 0.5 * (expected[5] - negative["model.norm.weight"][5])
    assert same_bits(read_tensors(tmp_path / "dialed")["model.norm.weight"], expected)


def test_several_scales_share_one_look(trained: Callable) -> None:
    _, folder, tensors = trained()
    dial = Dial.of(open_checkpoint(folder))
    name = "model.layers.5.mlp.down_proj.weight"
    for scale in (0.25, 0.5, 2):
        with SourceFiles(dial.checkpoint.states) as files:
            found = OpenTensors(dial.at(scale), files).tensor(name)
        assert same_bits(found, multiplied(tensors[name], scale))


def test_the_manifest_records_what_was_dialed(trained: Callable, tmp_path: Path) -> None:
    from blake3 import blake3

    _, folder, tensors = trained(dtype="bfloat16")
    done = hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting((0.5, 1)))
    record = json.loads((tmp_path / "dialed" / "llamapro.json").read_text())
    names = [name for name in tensors if OUTPUT.fullmatch(name) and ".2." in name]
    hashes = {name: blake3(tensors[name].view(torch.uint8).numpy().tobytes()).hexdigest() for name in names}
    assert record["dial"] == {"added_block_scale": [0.5, 1.0], "earlier": [], "undialed_hashes": hashes}
    assert record["format_version"] == 1
    assert "dialed × 0.5, 1: 2 tensors" in summary(done)
    assert "dialed          × 0.5, 1 (2 tensors)" in str(inspect(tmp_path / "dialed"))
    assert "dial" not in json.loads((folder / "llamapro.json").read_text())


def test_a_second_dial_multiplies_and_records_both(trained: Callable, tmp_path: Path) -> None:
    _, folder, tensors = trained(dtype="bfloat16")
    hf_to_hf(folder, tmp_path / "once", dial=DialSetting(0.7))
    hf_to_hf(tmp_path / "once", tmp_path / "twice", dial=DialSetting((0.5, 0.3)))
    name = "model.layers.5.mlp.down_proj.weight"
    assert same_bits(read_tensors(tmp_path / "twice")[name], multiplied(multiplied(tensors[name], 0.7), 0.3))
    assert str(Manifest.read(tmp_path / "twice").dial) == "× 0.7, then × 0.5, 0.3"
    hf_to_hf(tmp_path / "twice", tmp_path / "cast", dtype="float32")
    assert Manifest.read(tmp_path / "cast").dial == Manifest.read(tmp_path / "twice").dial


def test_a_further_round_starts_without_a_record(trained: Callable, tmp_path: Path) -> None:
    _, folder, _ = trained()
    hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(0.5))
    expand_hf(tmp_path / "dialed", tmp_path / "round 2", expansion=Expansion.at(6))
    assert Manifest.read(tmp_path / "round 2").dial is None


def test_a_resumed_conversion_uses_no_tensors_of_another_scale(
    trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_llamapro.checkpoint import convert

    _, folder, tensors = trained()
    resume = Options(resume=True, num_workers=1)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert, "_write_small_files", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(0.5), options=resume)
    done = hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(0.25), options=resume)
    assert done.num_resumed_bytes == 0
    name = "model.layers.5.mlp.down_proj.weight"
    assert same_bits(read_tensors(tmp_path / "dialed")[name], multiplied(tensors[name], 0.25))
    with monkeypatch.context() as patched:
        patched.setattr(convert, "_write_small_files", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_to_hf(folder, tmp_path / "again", dial=DialSetting(0.5), options=resume)
    assert hf_to_hf(folder, tmp_path / "again", dial=DialSetting(0.5), options=resume).num_resumed_bytes > 0


def refusal(error: type[Exception], make: Callable[[], object]) -> str:
    with pytest.raises(error) as raised:
        make()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        (-1, "is -1:"),
        (float("nan"), "is nan:"),
        (float("inf"), "is inf:"),
        (3, "is 3: it must be from 0"),
        ((0.5, 1, 1), "has 3 values, but the model has 2 added blocks"),
        ((), "has 0 values"),
    ],
    ids=str,
)
def test_an_impossible_scale_is_refused(scale: object, problem: str, trained: Callable, tmp_path: Path) -> None:
    _, folder, _ = trained()
    for refused in (
        lambda: hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(scale)),
        lambda: dialed(open_checkpoint(folder), scale),
    ):
        assert problem in refusal(ConfigError, refused)
    assert not (tmp_path / "dialed").exists()


@pytest.mark.parametrize("scales", [(0.5, 1), (0.5, 0.5), (1, 1)])
def test_a_scale_for_each_block_cannot_say_how_far_originals_move(scales: tuple[float, ...], trained: Callable) -> None:
    original, folder, _ = trained(lambda name: True)
    found = refusal(ConfigError, lambda: dialed(open_checkpoint(folder), scales, original=open_checkpoint(original)))
    assert "model.embed_tokens.weight: give one value for all" in found


def test_a_model_that_was_not_trained_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    assert "has no llamapro.json" in refusal(CheckpointError, lambda: dialed(open_checkpoint(tiny_model()), 0.5))
    hf_to_megatron(tiny_model(), tmp_path / "megatron")
    for original in (None, open_checkpoint(tiny_model())):
        found = refusal(
            CheckpointError, lambda given=original: dialed(open_checkpoint(tmp_path / "megatron"), 0.5, original=given)
        )
        assert "has no added blocks, no adapters and no trained weights" in found


def test_a_missing_original_is_asked_for(everything: Callable, trained: Callable, tmp_path: Path) -> None:
    for make in (everything, lambda: trained(lambda name: True)):
        _, folder, _ = make()
        found = refusal(CheckpointError, lambda source=folder: hf_to_hf(source, tmp_path / "x", dial=DialSetting(0.5)))
        assert "model.embed_tokens.weight and 38 more was trained" in found and "give --original" in found
    assert not (tmp_path / "x").exists()


def test_a_cast_hides_what_was_trained(tiny_model: Tiny, tmp_path: Path) -> None:
    expand_hf(tiny_model(), tmp_path / "float32", expansion=Expansion.at(*ADDED))
    hf_to_hf(tmp_path / "float32", tmp_path / "cast", dtype="bfloat16")
    found = refusal(CheckpointError, lambda: dialed(open_checkpoint(tmp_path / "cast"), 0.5))
    assert "was cast from float32 to bfloat16" in found and "give --original" in found
    assert dialed(open_checkpoint(tmp_path / "cast"), 0.5, original=open_checkpoint(tiny_model())).dialed


def test_another_original_is_refused(trained: Callable, tiny_model: Tiny, tmp_path: Path) -> None:
    _, folder, _ = trained()
    others = (
        tiny_model(seed=1),
        tiny_model(num_hidden_layers=3),
        tiny_model(dtype="bfloat16"),
        folder.parent / "moved",
    )
    hf_to_hf(folder, others[-1])
    move(others[-1], lambda name: name == "model.norm.weight")
    for other in others:
        found = refusal(
            CheckpointError, lambda given=other: dialed(open_checkpoint(folder), 0.5, original=open_checkpoint(given))
        )
        assert f"{other} is not the original of {folder}: its model." in found


def test_adding_blocks_at_the_same_time_is_refused(trained: Callable, tmp_path: Path) -> None:
    _, folder, _ = trained()
    options = {"expansion": Expansion.at(6), "dial": DialSetting(0.5)}
    found = refusal(ExpansionError, lambda: hf_to_megatron(folder, tmp_path / "x", **options))
    assert "dial it, then expand the result" in found


def test_several_types_are_refused(trained: Callable, tmp_path: Path) -> None:
    _, folder, tensors = trained()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "mixes types" in refusal(CheckpointError, lambda: dialed(open_checkpoint(folder), 0.5))


def test_a_value_that_becomes_infinite_is_refused(trained: Callable, tmp_path: Path) -> None:
    _, folder, tensors = trained(dtype="float16")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = 60000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = refusal(CheckpointError, lambda: hf_to_hf(folder, tmp_path / "x", dial=DialSetting(2)))
    assert "model.layers.2.mlp.down_proj.weight has values that float16 cannot hold" in found


def test_a_damaged_record_is_refused(trained: Callable, tmp_path: Path) -> None:
    _, folder, _ = trained()
    hf_to_hf(folder, tmp_path / "dialed", dial=DialSetting(0.5))
    good = Manifest.read(tmp_path / "dialed").to_json()
    for damage in (
        {"added_block_scale": "0.5"},
        {"added_block_scale": [0.5, 0.5, 0.5]},
        {"added_block_scale": 7},
        {"added_block_scale": True},
        {"earlier": None},
        {"earlier": [float("nan")]},
        {"undialed_hashes": {"a": 1}},
        {"undialed_hashes": []},
    ):
        with pytest.raises(CheckpointError, match="the manifest is damaged"):
            Manifest.from_json({**good, "dial": {**good["dial"], **damage}}, where="here")
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        Manifest.from_json({**good, "dial": 0.5}, where="here")
    assert dataclasses.replace(Manifest.from_json(good, where="here")) == Manifest.read(tmp_path / "dialed")
