"""Packs: the added blocks of a run, alone, and models composed of them.

References: the export of the same run, transformers' logits, and a model put together by hand of transformers' blocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import workers
from megatron_llamapro.checkpoint.compose import ScaledPack, compose
from megatron_llamapro.checkpoint.convert import TORCH_DIST, expand_hf, hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.extract import extract
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.checkpoint.writing import Options
from megatron_llamapro.config.errors import CheckpointError, ConfigError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.round import Expansion, Init
from megatron_llamapro.testing.distributed import run_distributed
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]
OUTPUTS = ("o_proj.weight", "down_proj.weight", "w2.weight", "o_proj.bias", "down_proj.bias")


def trained(source: Path, folder: Path, *positions: int, seed: int = 1, init: Init = Init.COPY) -> Path:
    """Write an export whose added blocks were trained: each of their tensors gets random values."""
    expand_hf(source, folder, expansion=Expansion.at(*positions, init=init))
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        if any(name.startswith(f"model.layers.{layer}.") for layer in positions):
            tensors[name] += (0.1 * torch.randn(tensors[name].shape, generator=generator)).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def same_tensors(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(same_bytes(left[name], right[name]) for name in left)


@torch.no_grad()
def logits_of(model: Path | torch.nn.Module) -> torch.Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokens = torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(1))
    return model.eval()(tokens, use_cache=False).logits


def config_of(folder: Path) -> dict:
    return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key != "llamapro"}


def all_ok(original: Path, expanded: Path, **settings: object) -> bool:
    checks = list(verify(original, expanded, **settings))
    assert all(check.ok for check in checks), [str(check) for check in checks if not check.ok]
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_pack_of_a_run_gives_the_runs_export(
    dtype: str, run_config: Callable, models: Callable, tmp_path: Path
) -> None:
    """Bit for bit, with the same config.json. The manifest differs in the pack's record alone."""
    config, original = run_config(train_iters=2, dtype=dtype), models(dtype=dtype).original_hf
    run_distributed(workers.train, 1, config)
    megatron_to_hf(Path(config.checkpoint.save), tmp_path / "export")
    done = extract(Path(config.checkpoint.save), tmp_path / "cpp")
    compose(original, tmp_path / "composed", packs=[ScaledPack(tmp_path / "cpp")])
    composed, export = tmp_path / "composed", tmp_path / "export"
    assert (composed / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    assert config_of(composed) == config_of(export)
    assert {path.name for path in composed.iterdir()} == {path.name for path in export.iterdir()}
    ours, theirs = (Manifest.read(folder).to_json() for folder in (composed, export))
    [record] = ours.pop("packs")
    assert record == {"round": 1, "name": "cpp", "hash": done.record.hash, "scale": 1.0}
    assert ours == theirs
    assert torch.equal(logits_of(composed), logits_of(export))
    blocks = load_file(tmp_path / "cpp" / "added_blocks.safetensors")
    exported = load_file(export / "model.safetensors")
    assert blocks.keys() == {name for name in exported if name.startswith(("model.layers.2.", "model.layers.5."))}
    assert all(same_bytes(tensor, exported[name]) for name, tensor in blocks.items())
    assert all_ok(original, composed)


def test_a_pack_says_what_it_is(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama(), tmp_path / "source")
    (source / "LICENSE").write_text("as is")
    done = extract(trained(source, tmp_path / "run", 2, 5), tmp_path / "pack")
    files = {path.name for path in done.target.iterdir()}
    assert files == {"LICENSE", "added_blocks.safetensors", "llamapro_pack.json"}
    record = json.loads((done.target / "llamapro_pack.json").read_text())
    assert (record["family"], record["dtype"]) == ("llama", "float32")
    assert (record["positions"], record["copied_from"]) == ([2, 5], [1, 3])
    assert record["manifest"]["original_hashes"].keys() == load_file(source / "model.safetensors").keys()
    assert record["config"]["num_hidden_layers"] == 6
    again = extract(tmp_path / "run", tmp_path / "again")
    assert (again.record.hash, again.num_originals) == (done.record.hash, 2 * 9 + 2 + 9 * 2 + 1)


def test_no_pack_gives_the_base_back(tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama(dtype="bfloat16")
    compose(base, tmp_path / "copy")
    assert same_tensors(base, tmp_path / "copy") and torch.equal(logits_of(base), logits_of(tmp_path / "copy"))
    assert not inspect(tmp_path / "copy").plan.added_layers


# Positions of two packs for 4 blocks, and the blocks of the composed model: original, or a pack's.
TWO_PACKS = {
    "behind the same blocks": ((2, 5), (2, 5), "0 1 A2 B2 2 3 A5 B5"),
    "behind other blocks": ((1,), (3, 5), "0 A1 1 2 B3 3 B5"),
    "before block 0 and behind the last": ((0, 5), (0, 1), "A0 B0 B1 0 1 2 3 A5"),
    "a run behind a run": ((2, 3), (3, 4, 6), "0 1 A2 A3 2 B3 B4 3 B6"),
    "a longer run than the first pack's": ((2,), (2, 3), "0 1 A2 B2 B3 2 3"),
}


def by_hand(base: Path, packs: dict[str, Path], order: str) -> torch.nn.Module:
    """Return transformers' model with the packs' trained blocks put between its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    given = {name: AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for name, folder in packs.items()}
    given[""] = model
    places = [("", int(word)) if word.isdigit() else (word[0], int(word[1:])) for word in order.split()]
    kinds = [getattr(given[name].config, "layer_types", None) for name, _ in places]  # Qwen's attention masks
    model.config.layer_types = [kind and kind[layer] for kind, (_, layer) in zip(kinds, places, strict=True)]
    model.model.layers = torch.nn.ModuleList(given[name].model.layers[layer] for name, layer in places)
    model.config.num_hidden_layers = len(places)
    return model


@pytest.mark.parametrize("case", TWO_PACKS)
def test_two_packs_equal_a_model_put_together_by_hand(case: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama()
    first, second, order = TWO_PACKS[case]
    runs = {
        "A": trained(base, tmp_path / "A", *first, seed=1),
        "B": trained(base, tmp_path / "B", *second, seed=2),
    }
    packs = [extract(run, tmp_path / f"pack {name}").target for name, run in runs.items()]
    compose(base, tmp_path / "both", packs=[ScaledPack(pack) for pack in packs])
    assert torch.equal(logits_of(tmp_path / "both"), logits_of(by_hand(base, runs, order)))
    found = inspect(tmp_path / "both")
    drawn = "".join("o12"[layer.added_in_round] for layer in found.plan.layers)
    assert drawn == "".join("o" if word.isdigit() else {"A": "1", "B": "2"}[word[0]] for word in order.split())
    assert "pack A × 1 (round 1), pack B × 1 (round 2)" in str(found)
    compose(base, tmp_path / "one", packs=[ScaledPack(packs[0])])
    assert all_ok(base, tmp_path / "both") and all_ok(tmp_path / "one", tmp_path / "both")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_packs_of_every_family_are_put_into_its_model(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    base = tiny_model(dtype="bfloat16", **TINY_FAMILIES[family])
    runs = {
        "A": trained(base, tmp_path / "A", 2, 5, seed=1),
        "B": trained(base, tmp_path / "B", 2, seed=2),
    }
    packs = [ScaledPack(extract(run, tmp_path / f"pack {name}").target) for name, run in runs.items()]
    compose(base, tmp_path / "one", packs=packs[:1])
    assert same_tensors(tmp_path / "one", runs["A"]) and config_of(tmp_path / "one") == config_of(runs["A"])
    compose(base, tmp_path / "both", packs=packs)
    assert torch.equal(logits_of(tmp_path / "both"), logits_of(by_hand(base, runs, "0 1 A2 B2 2 3 A5")))
    assert all_ok(base, tmp_path / "both")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_multiplies_the_output_projections(dtype: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama(dtype=dtype)
    packs = [
        extract(trained(base, tmp_path / f"run {number}", 2, 5, seed=number), tmp_path / f"pack {number}").target
        for number in (1, 2)
    ]
    compose(base, tmp_path / "plain", packs=[ScaledPack(pack) for pack in packs])
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    scales, second_packs_blocks = (1.0, 0.75), ("model.layers.3.", "model.layers.7.")
    compose(
        base, tmp_path / "scaled", packs=[ScaledPack(pack, scale) for pack, scale in zip(packs, scales, strict=True)]
    )
    for name, tensor in load_file(tmp_path / "scaled" / "model.safetensors").items():
        is_scaled = name.startswith(second_packs_blocks) and name.endswith(OUTPUTS)
        expected = (plain[name].float() * 0.75).to(plain[name].dtype) if is_scaled else plain[name]
        assert same_bytes(tensor, expected), name
    assert [pack.scale for pack in Manifest.read(tmp_path / "scaled").packs] == [1.0, 0.75]
    assert all_ok(base, tmp_path / "scaled", undialed=tmp_path / "plain")
    compose(base, tmp_path / "off", packs=[ScaledPack(pack, 0.0) for pack in packs])
    off = load_file(tmp_path / "off" / "model.safetensors")
    assert all(
        not tensor.view(torch.uint8).any()
        for name, tensor in off.items()
        if name.startswith(("model.layers.2.", *second_packs_blocks, "model.layers.6.")) and name.endswith(OUTPUTS)
    )
    assert torch.equal(logits_of(tmp_path / "off"), logits_of(base))
    assert all_ok(base, tmp_path / "off")


def test_a_composed_model_converts_trains_and_grows_as_any_other(
    models: Callable, run_config: Callable, tmp_path: Path
) -> None:
    base = models().original_hf
    runs = {
        name: trained(base, tmp_path / name, *places, seed=len(places)) for name, places in (("A", (2, 5)), ("B", (2,)))
    }
    packs = [ScaledPack(extract(run, tmp_path / f"pack {name}").target, 0.5) for name, run in runs.items()]
    compose(base, tmp_path / "hf", packs=packs)
    compose(base, tmp_path / "megatron", packs=packs, kind=TORCH_DIST)
    compose(models().original_megatron, tmp_path / "of megatron", packs=packs)
    assert same_tensors(tmp_path / "of megatron", tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()
    assert Manifest.read(tmp_path / "back") == Manifest.read(tmp_path / "converted") == Manifest.read(tmp_path / "hf")
    config = run_config(train_iters=1, checkpoint=tmp_path / "megatron", trainable=("round_2",))
    run_distributed(workers.train, 1, config)
    megatron_to_hf(Path(config.checkpoint.save), tmp_path / "tuned")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "tuned"))
    moved = {name for name in before if not same_bytes(before[name], after[name])}
    assert moved and all(name.startswith("model.layers.3.") for name in moved)
    expand_hf(tmp_path / "tuned", tmp_path / "larger", expansion=Expansion.at(0, 8))
    assert all_ok(base, tmp_path / "larger") and all_ok(tmp_path / "tuned", tmp_path / "larger")
    assert [pack.name for pack in Manifest.read(tmp_path / "larger").packs] == ["pack A", "pack B"]


@pytest.mark.parametrize("init", [Init.COPY, Init.MEAN, Init.RANDOM])
def test_untrained_packs_are_proven_identities(init: Init, tiny_llama: Tiny, tmp_path: Path) -> None:
    """The blocks of each pack are compared with what its init makes of the original blocks, not of other packs'."""
    base, packs = tiny_llama(), []
    for name, positions in (("A", (2,)), ("B", (2, 5))):
        expand_hf(base, tmp_path / name, expansion=Expansion.at(*positions, init=init, seed=7))
        packs.append(ScaledPack(extract(tmp_path / name, tmp_path / f"pack {name}").target))
    trained_one = ScaledPack(extract(trained(base, tmp_path / "C", 2), tmp_path / "pack C").target)
    compose(base, tmp_path / "both", packs=packs)
    text = {check.name: check for check in verify(base, tmp_path / "both")}
    assert all(check.ok for check in text.values())
    assert text["added blocks"].text.startswith("2, 3, 6: identity") and "function" in text
    compose(base, tmp_path / "behind", packs=[trained_one, *packs])
    assert all_ok(base, tmp_path / "behind")


def test_a_pack_trained_in_another_type_than_its_base(tiny_llama: Tiny, tmp_path: Path) -> None:
    """The originals are cast as the run had cast them."""
    base = tiny_llama(dtype="float32")
    hf_to_megatron(base, tmp_path / "start", expansion=Expansion.at(2, 5), dtype="bfloat16")
    megatron_to_hf(tmp_path / "start", tmp_path / "export")
    extract(tmp_path / "start", tmp_path / "pack")
    compose(base, tmp_path / "composed", packs=[ScaledPack(tmp_path / "pack")])
    assert same_tensors(tmp_path / "composed", tmp_path / "export")
    expand_hf(tiny_llama(dtype="bfloat16"), tmp_path / "narrow", expansion=Expansion.at(2, 5))
    hf_to_megatron(tmp_path / "narrow", tmp_path / "wide", dtype="float32")
    megatron_to_hf(tmp_path / "wide", tmp_path / "wide export")
    extract(tmp_path / "wide", tmp_path / "wide pack")
    compose(tiny_llama(dtype="bfloat16"), tmp_path / "composed wide", packs=[ScaledPack(tmp_path / "wide pack")])
    assert same_tensors(tmp_path / "composed wide", tmp_path / "wide export")
    with pytest.raises(CheckpointError, match=r"is float32, but the run of .* had its weights cast to bfloat16: give"):
        compose(base, tmp_path / "no", packs=[ScaledPack(tmp_path / "wide pack")])
    hf_to_megatron(tmp_path / "export", tmp_path / "cast twice", dtype="float16")
    with pytest.raises(CheckpointError, match="was cast from bfloat16 to float16, so its hashes do not show"):
        extract(tmp_path / "cast twice", tmp_path / "no")


def test_an_interrupted_composition_resumes_only_with_the_same_scales(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama()
    pack = extract(trained(base, tmp_path / "run", 2, 5), tmp_path / "pack").target

    def interrupt(scale: float) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("megatron_llamapro.config.drafts.sync_tree", _interrupt)
            compose(base, tmp_path / "it", packs=[ScaledPack(pack, scale)])

    def resume(scale: float) -> tuple[int, bytes]:
        done = compose(base, tmp_path / "it", packs=[ScaledPack(pack, scale)], options=Options(resume=True))
        return done.num_resumed_bytes, (tmp_path / "it" / "model.safetensors").read_bytes()

    interrupt(0.5)
    resumed_bytes, half = resume(0.5)
    assert resumed_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "it" / "model.safetensors").values())
    shutil.rmtree(tmp_path / "it")
    interrupt(0.75)
    assert resume(0.5) == (0, half)


def test_an_interrupted_extraction_leaves_nothing_and_resumes(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pack = trained(tiny_llama(), tmp_path / "run", 2, 5), tmp_path / "pack"
    expected = extract(run, tmp_path / "expected").target
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_llamapro.config.drafts.sync_tree", _interrupt)
        extract(run, pack)
    assert not pack.exists()
    extract(run, pack, options=Options(resume=True))
    assert {path.name: path.read_bytes() for path in pack.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    assert not (tmp_path / ".pack.partial").exists()


def _interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def test_what_is_no_pack_cannot_be_extracted(tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama()
    run = trained(base, tmp_path / "run", 2, 5)
    embedded = shutil.copytree(run, tmp_path / "embedded")
    tensors = load_file(run / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, embedded / "model.safetensors")
    expand_hf(run, tmp_path / "two rounds", expansion=Expansion.at(0))
    compose(base, tmp_path / "dialed", packs=[ScaledPack(extract(run, tmp_path / "pack").target, 0.5)])
    refused = {
        embedded: r"model.embed_tokens.weight is not the original's .*more than added blocks was trained",
        base: r"has no llamapro.json to say which blocks were added",
        tmp_path / "two rounds": "has blocks of 2 rounds, but a pack holds those of one",
        tmp_path / "dialed": r"was dialed \(× 0.5\): extract from the checkpoint that was dialed",
        tmp_path / "pack": "it is a pack of added blocks, not a model: `llamapro compose",
    }
    compose(base, tmp_path / "copy")
    refused[tmp_path / "copy"] = "has no added blocks: there is nothing to extract"
    for folder, line in refused.items():
        with pytest.raises(CheckpointError, match=line) as refusal:
            extract(folder, tmp_path / "no")
        assert "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        extract(run, tmp_path / "pack")
    assert not any(path.name.strip(".").removesuffix(".partial") == "no" for path in tmp_path.iterdir())


def test_packs_of_another_base_are_refused_by_the_first_tensor(tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama()
    pack = extract(trained(base, tmp_path / "run", 2, 5), tmp_path / "pack").target
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    differing = shutil.copytree(base, tmp_path / "differing")
    (differing / "config.json").write_text((base / "config.json").read_text().replace("1e-06", "1e-05"))
    refused = {
        other: r"is not the base of the pack .*: its model.layers.3.mlp.up_proj.weight has another hash; .*\(tiny\)",
        differing: r"is not the base of the pack .*: its config.json differs in layernorm_epsilon",
        tiny_llama(num_hidden_layers=5): "its config.json differs in num_layers",
        tmp_path / "run": "has added blocks: give the model that the packs' runs were expanded from",
    }
    for folder, line in refused.items():
        with pytest.raises(CheckpointError, match=line) as refusal:
            compose(folder, tmp_path / "no", packs=[ScaledPack(pack)])
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "no").exists()


def test_packs_that_cannot_be_put_together_are_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama()
    pack = extract(trained(base, tmp_path / "run", 2, 5), tmp_path / "pack").target
    copy = shutil.copytree(pack, tmp_path / "copy of the pack")
    hf_to_megatron(base, tmp_path / "bfloat16", expansion=Expansion.at(2), dtype="bfloat16")
    narrow = extract(tmp_path / "bfloat16", tmp_path / "narrow pack").target
    damaged = {}
    for name, edit in {
        "weights": lambda folder: _flip_last_byte(folder / "added_blocks.safetensors"),
        "lacking": lambda folder: (folder / "added_blocks.safetensors").unlink(),
        "hash": lambda folder: _edit(folder, hash="0" * 64),
        "config": lambda folder: _edit(folder, config={**config_of(tmp_path / "run"), "num_hidden_layers": 7}),
        "model": lambda folder: _edit(folder, config={"model_type": "gpt2"}),
        "list": lambda folder: _edit(folder, config=[1]),
        "tensors": lambda folder: save_file({"a": torch.ones(1)}, folder / "added_blocks.safetensors"),
        "json": lambda folder: (folder / "llamapro_pack.json").write_text("{"),
        "newer": lambda folder: _edit(folder, format_version=2),
    }.items():
        damaged[name] = shutil.copytree(pack, tmp_path / f"damaged {name}")
        edit(damaged[name])
    refused = {
        (pack, copy): "are the same pack: give each pack once",
        (pack, narrow): "is float32, but .*narrow pack is bfloat16: extract both from checkpoints of one type",
        (base,): r"is not a pack, it has no llamapro_pack.json: make one with llamapro extract",
        (damaged["weights"],): r"is damaged: model.layers.5.\S+ has another hash; extract the pack again",
        (damaged["lacking"],): r"lacks the file added_blocks.safetensors: copy the whole pack",
        (damaged["hash"],): r"llamapro_pack.json is damaged .*its hashes do not match",
        (damaged["config"],): "its manifest has 6 layers, but its config.json has 7",
        (damaged["model"],): r"llamapro_pack.json: model_type 'gpt2' is not supported",
        (damaged["list"],): r"llamapro_pack.json is damaged",
        (damaged["tensors"],): r"does not hold the tensors that llamapro_pack.json describes: extract the pack again",
        (damaged["json"],): r"llamapro_pack.json is damaged",
        (damaged["newer"],): "has format 2, this version reads 1",
    }
    for packs, line in refused.items():
        with pytest.raises(CheckpointError, match=line) as refusal:
            compose(base, tmp_path / "no", packs=[ScaledPack(each) for each in packs])
        assert "\n" not in str(refusal.value)
    for scale in (-0.5, 2.5):
        with pytest.raises(ConfigError, match=f"the scale of .*pack is {scale}: it must be from 0"):
            compose(base, tmp_path / "no", packs=[ScaledPack(pack, scale)])
    with pytest.raises(CheckpointError, match="overlap"):
        compose(base, pack, packs=[ScaledPack(pack)], kind=TORCH_DIST)
    assert not (tmp_path / "no").exists()


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, **fields: object) -> None:
    path = folder / "llamapro_pack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
