"""Tensors under other names, in other layouts or other types are read as transformers reads them. Anything that
transformers does not read, or that is not a plain weight, is refused with advice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    FineGrainedFP8Config,
)

from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.formats.hf_reader import open_hf
from megatron_llamapro.checkpoint.formats.hf_tensors import SIGNS, quantised, what_they_are
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADDED = Expansion.at(2, 5)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def rewrite(folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
    return folder


def write_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@torch.no_grad()
def logits_of(folder: Path, dtype: object = "auto") -> torch.Tensor:
    """Return the logits by transformers; no tensor may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()(torch.arange(3, 43)[None]).logits


def without_model(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def head_instead(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def head_in_the_index(folder: Path) -> None:
    """Write a shard and an index that also name a tied head."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys([*tensors, HEAD], "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stacked_experts(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(folder / SINGLE)


TIED = {"tie_word_embeddings": True}
AS_TRANSFORMERS = {
    "a tied model's head, without its embedding": (TIED, lambda folder: rewrite(folder, head_instead)),
    "an index with a tied head that is nowhere": (TIED, head_in_the_index),
    "a tied model saved without `model.`": ({**TIED, **TINY_FAMILIES["qwen2"]}, lambda f: rewrite(f, without_model)),
    "a model saved with `model.` twice": (
        {},
        lambda folder: rewrite(folder, lambda tensors: {f"model.{name}": v for name, v in tensors.items()}),
    ),
    "a Mixtral with stacked experts": (TINY_FAMILIES["mixtral"], stacked_experts),
    "stacked experts without `model.`, tied": (
        {**TIED, **TINY_FAMILIES["mixtral"]},
        lambda folder: (stacked_experts(folder), rewrite(folder, without_model)),
    ),
}


@pytest.mark.parametrize(("settings", "change"), AS_TRANSFORMERS.values(), ids=AS_TRANSFORMERS.keys())
def test_variants_are_read_as_transformers_reads_them(
    settings: dict, change: Callable[[Path], object], damaged: Tiny, tiny_model: Tiny, tmp_path: Path
) -> None:
    """The result has the ordinary names and bytes."""
    source = damaged(**settings)
    change(source)
    hf_to_megatron(source, tmp_path / "megatron", expansion=ADDED)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(source))
    expand_hf(tiny_model(**settings), tmp_path / "ordinary", expansion=ADDED)
    ours, ordinary = (load_file(tmp_path / name / SINGLE) for name in ("back", "ordinary"))
    assert ours.keys() == ordinary.keys()
    assert all(torch.equal(ours[name], ordinary[name]) for name in ours)
    assert all(check.ok for check in verify(source, tmp_path / "megatron"))


def norms_in_float32(tensors: Tensors) -> Tensors:
    """Give the norms float32 values that bfloat16 cannot hold."""
    return {name: tensor.float() * 1.003 if "norm" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mixed_types_are_cast_to_the_requested_type(dtype: str, damaged: Tiny, tmp_path: Path) -> None:
    source = rewrite(damaged(dtype="bfloat16"), norms_in_float32)
    expand_hf(source, tmp_path / "hf", expansion=ADDED, dtype=dtype)
    assert torch.equal(logits_of(tmp_path / "hf"), logits_of(source, dtype))
    stored, theirs = load_file(tmp_path / "hf" / SINGLE), load_file(source / SINGLE)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert torch.equal(stored["model.norm.weight"], theirs["model.norm.weight"].to(getattr(torch, dtype)))
    found = {check.name: check for check in verify(source, tmp_path / "hf")}
    assert all(check.ok for check in found.values()), found
    assert f"after the cast from bfloat16 and float32 to {dtype}" in found["original tensors"].text


def test_mixed_types_without_dtype_are_refused(damaged: Tiny, tmp_path: Path) -> None:
    source = rewrite(damaged(dtype="bfloat16"), norms_in_float32)
    with pytest.raises(
        CheckpointError, match=r"mixes types: .*norm\.weight is float32, most are bfloat16: give --dtype bf"
    ):
        hf_to_megatron(source, tmp_path / "megatron")
    assert "bfloat16, but 9 tensors of float32 (give --dtype to convert it)" in str(inspect(source))
    sizes = [tensor.nbytes for tensor in load_file(source / SINGLE).values()]
    assert open_hf(source).weight_bytes == sum(part.num_bytes for part in inspect(source).parts) == sum(sizes)


def test_a_trained_model_of_mixed_types_is_not_verified(damaged: Tiny, tiny_llama: Tiny, tmp_path: Path) -> None:
    """A cast could hide a norm's change that is too small for bfloat16."""
    original = tiny_llama(dtype="bfloat16")
    expand_hf(original, tmp_path / "hf", expansion=ADDED)
    rewrite(tmp_path / "hf", norms_in_float32)
    with pytest.raises(CheckpointError, match="mixes bfloat16 and float32: convert it with --dtype, then verify"):
        next(verify(original, tmp_path / "hf"))


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def inside(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(".mlp.", f".{part}.mlp."): tensor for name, tensor in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


FOREIGN = {
    "torch.compile": (prefixed("_orig_mod."), r"_orig_mod\.\S+ and 38 more: torch.compile's: save model\._orig_mod"),
    "data parallelism": (prefixed("module."), r"it has module\.\S+ and 38 more: data parallelism's"),
    "DeepSpeed, compiled": (prefixed("module._orig_mod."), "torch.compile's"),
    "PEFT": (prefixed("base_model.model."), r"base_model\.model\.\S+ and 38 more: PEFT's: merge_and_unload\(\) first"),
    "PEFT's adapters": (renamed("up_proj.weight", "up_proj.base_layer.weight"), "PEFT's"),
    "FSDP": (inside("_fsdp_wrapped_module"), "FSDP's"),
    "recomputation": (inside("_checkpoint_wrapped_module"), "activation checkpointing's: remove _checkpoint_wrapped"),
    "a prefix that nobody knows": (prefixed("policy.net."), r"remove policy\.net\. from the names of all tensors"),
    "a model of images and text": (prefixed("language_model."), "reads more than text, .*save its language model"),
    "eyes": (lambda t: {**t, "vision_tower.conv.weight": torch.ones(3)}, "reads more than text"),
    "Megatron's names": (renamed("model.layers.", "decoder.layers."), "Megatron's names: megatron-to-hf converts"),
    "Meta's names": (renamed("model.embed_tokens", "tok_embeddings"), "Meta's or Mistral's own format"),
    "the first Yi": (renamed("input_layernorm", "ln1"), "newer files of that model, whose model_type is llama"),
    "fused projections": (renamed("self_attn.q_proj", "self_attn.qkv_proj"), "stored fused"),
    "experts of another family": (renamed("mlp.up_proj", "mlp.experts.0.up_proj"), "in another layout than Mixtral's"),
    "a reward model": (renamed("lm_head", "score"), r"it has score\.weight: a classifier's, e\.g\. a reward model's"),
    "no head": (lambda t: {k: v for k, v in t.items() if k != HEAD}, "saved without its head, as embedding models are"),
    "quantised, and config.json is silent": (renamed("up_proj.weight", "up_proj.qweight"), "quantised weights cannot"),
    "fp8 saved again": (lambda t: {**t, UP + "_scale_inv": torch.ones(1)}, "quantised weights cannot be expanded"),
}


@pytest.mark.parametrize(("edit", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_tensor_names_are_refused(edit: Callable, message: str, damaged: Tiny, tmp_path: Path) -> None:
    source = rewrite(damaged(), edit)
    with pytest.raises(CheckpointError, match=message) as refusal:
        hf_to_megatron(source, tmp_path / "megatron")
    assert "\n" not in str(refusal.value) and str(source) in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


TWICE = {
    "stacked experts and single ones": (
        TINY_FAMILIES["mixtral"],
        lambda tensors: {**tensors, "model.layers.0.mlp.experts.down_proj": torch.ones(4, 64, 96)},
        "in another layout than Mixtral's",
    ),
    "a router under both names": (
        TINY_FAMILIES["mixtral"],
        lambda tensors: {**tensors, "model.layers.0.mlp.gate.weight": torch.ones(4, 64)},
        r"has the tensor model\.layers\.0\.mlp\.gate\.weight",
    ),
    "`model.` twice, and once": (
        {},
        lambda tensors: {**{f"model.{name}": v for name, v in tensors.items()}, HEAD: tensors[HEAD] + 1},
        "remove model. from the names of all",
    ),
}


@pytest.mark.parametrize(("settings", "edit", "message"), TWICE.values(), ids=TWICE.keys())
def test_a_tensor_stored_under_two_names_is_refused(
    settings: dict, edit: Callable, message: str, damaged: Tiny, tmp_path: Path
) -> None:
    """Neither copy is preferred, and none is dropped."""
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(rewrite(damaged(**settings), edit), tmp_path / "megatron")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", r"it is a PEFT adapter: load it with its model, merge_and_unload\(\)"),
        ("llama-2-7b.Q4_K_M.gguf", "it is GGUF"),
        ("consolidated.00.pth", "Meta's or Mistral's own format"),
        ("consolidated.safetensors", "Meta's or Mistral's own format"),
        ("tf_model.h5", "TensorFlow's format"),
        ("flax_model.msgpack", "Flax's format"),
    ],
)
def test_other_weight_formats_are_refused_unless_safetensors_exist(
    name: str, message: str, damaged: Tiny, tmp_path: Path
) -> None:
    """With and without a config.json."""
    source = damaged()
    (source / name).touch()
    open_hf(source)
    (source / SINGLE).unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=message) as refusal:
            hf_to_megatron(source, tmp_path / "megatron")
        assert "\n" not in str(refusal.value) and str(source) in str(refusal.value)
        (source / "config.json").unlink(missing_ok=True)


def test_every_sign_of_foreign_names_is_tried_and_matches_no_family(tiny_model: Tiny) -> None:
    plain = load_file(tiny_model() / SINGLE)
    said = [str(what_they_are([name for name in edit(plain) if name not in plain], [])) for edit, _ in FOREIGN.values()]
    assert {meaning for _, meaning in SIGNS} == {
        meaning for _, meaning in SIGNS if any(text.endswith(meaning) for text in said)
    }
    for settings in TINY_FAMILIES.values():
        assert what_they_are(sorted(load_file(tiny_model(**settings) / SINGLE)), []) is None


def test_a_tensor_with_different_values_in_two_shards_names_both(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged(max_shard_size="50KB")
    shards = sorted(source.glob("model-*.safetensors"))
    holder = next(shard for shard in shards if UP in load_file(shard))
    other = shards[0] if holder != shards[0] else shards[1]
    save_file({**load_file(other), UP: load_file(holder)[UP] + 1}, other, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{UP} differs between two shards, model-.* and model-") as refusal:
        hf_to_megatron(source, tmp_path / "megatron")
    assert all(shard.name in str(refusal.value) for shard in (holder, other))


@pytest.mark.parametrize("named", [0, 1], ids=["the first is named", "the second is named"])
def test_a_tensor_stored_twice_must_be_equal_in_both_shards(named: int, damaged: Tiny, tmp_path: Path) -> None:
    """The index may name either shard."""
    source = damaged(max_shard_size="50KB")
    hf_to_megatron(source, tmp_path / "expected")
    shards = sorted(source.glob("model-*.safetensors"))
    holder = next(shard for shard in shards if UP in load_file(shard))
    other = shards[0] if holder != shards[0] else shards[1]
    held = load_file(holder)[UP]
    save_file({**load_file(other), UP: held}, other, metadata={"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][UP] = sorted([holder, other])[named].name
    (source / INDEX).write_text(json.dumps(index))
    assert logits_of(source).isfinite().all()  # transformers reads it
    hf_to_megatron(source, tmp_path / "megatron")
    ours, expected = ((tmp_path / name / "__0_0.distcp").read_bytes() for name in ("megatron", "expected"))
    assert ours == expected
    for changed in (held.half(), held[:-1], held.nextafter(torch.tensor(9.0))):
        save_file({**load_file(other), UP: changed.contiguous()}, other, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{UP} differs between two shards, model-.* and model-"):
            hf_to_megatron(source, tmp_path / "differs")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_is_refused_as_one(kind: type, family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """As saved by transformers. A tied classifier lacks no tensor but has one too many."""
    for tied in (True, False):
        model = kind.from_pretrained(tiny_model(model_type=family, tie_word_embeddings=tied), num_labels=1)
        model.save_pretrained(tmp_path / "it")
        with pytest.raises(CheckpointError, match=r"it has score\.\S+.*: a classifier's, e\.g\. a reward model's"):
            hf_to_megatron(tmp_path / "it", tmp_path / "megatron")


def to_fp8(tensors: Tensors) -> Tensors:
    """Store projections as FineGrainedFP8 does: float8 with one scale per block of 128 × 128."""
    found = dict(tensors)
    for name in [name for name in tensors if "_proj." in name]:
        scale = tensors[name].abs().max().float() / 448
        found[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in tensors[name].shape]
        found[f"{name}_scale_inv"] = scale.repeat(*blocks)
    return found


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
PACKED = lambda tensors: {name.replace("proj.weight", "proj.qweight"): value for name, value in tensors.items()}  # noqa: E731
BYTES = lambda tensors: {k: v.to(torch.uint8).view(-1, 1) if "proj" in k else v for k, v in tensors.items()}  # noqa: E731
QUANTISED: Mapping[str, tuple[dict, Callable[[Tensors], Tensors], str]] = {
    "GPTQ": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        PACKED,
        "quant_method 'gptq': quantised weights cannot be expanded: use the model that they were made from$",
    ),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, PACKED, "quant_method 'awq'"),
    "fp8": ({"quantization_config": FP8}, to_fp8, r"FineGrainedFP8Config\(dequantize=True\).*save_original_format"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        BYTES,
        r"model\.dequantize\(\)",
    ),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        PACKED,
        "compressed-tensors",
    ),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, BYTES, "mlx_lm.convert --dequantize"),
    "a method without a name": ({"quantization_config": {}}, PACKED, "quant_method 'None'"),
    "plain after all": (
        {"quantization_config": FP8},
        lambda tensors: tensors,
        "are plain float32: remove quantization_",
    ),
}


@pytest.mark.parametrize(("config", "edit", "message"), QUANTISED.values(), ids=QUANTISED.keys())
def test_quantised_weights_are_refused(
    config: dict, edit: Callable, message: str, damaged: Tiny, tmp_path: Path
) -> None:
    source = rewrite(damaged(config=config), edit)
    with pytest.raises(CheckpointError, match=message) as refusal:
        hf_to_megatron(source, tmp_path / "megatron")
    assert "quantised" in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_advice_for_fp8_works(damaged: Tiny, tmp_path: Path) -> None:
    """Run the advice of the message. Without save_original_format=False, transformers would quantise again."""
    source = rewrite(
        damaged(dtype="bfloat16", hidden_size=128, intermediate_size=256, config={"quantization_config": FP8}), to_fp8
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    hf_to_megatron(tmp_path / "plain", tmp_path / "megatron", expansion=ADDED)
    assert all(check.ok for check in verify(tmp_path / "plain", tmp_path / "megatron"))
    with pytest.raises(CheckpointError, match="quantised weights cannot be expanded"):
        hf_to_megatron(tmp_path / "again", tmp_path / "other")


def test_weights_are_not_quantised_if_config_json_says_nothing() -> None:
    assert quantised({"quantization_config": None, "quantization": None}) is None
