"""Conversions: both directions are bit-exact, and a model's other files travel with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llamapro.checkpoint.convert import Options, expand_hf, hf_to_megatron, megatron_to_hf
from megatron_llamapro.checkpoint.formats.hf_reader import open_hf
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.manifest import Manifest
from megatron_llamapro.expansion.round import Expansion
from megatron_llamapro.testing.checkpoints import read_with_torch
from megatron_llamapro.testing.tiny_models import TINY_FAMILIES

Tiny = Callable[..., Path]
ADDED = Expansion.at(2, 5)  # 4 → 6 layers


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a Hugging Face folder, read by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Assert equal names, types, shapes and bytes."""
    left, right = stored_tensors(ours), stored_tensors(theirs)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


ROUND_TRIPS = {
    "float32, grouped queries, one file": {},
    "float32, tied, several files": {"tie_word_embeddings": True, "max_shard_size": "100KB"},
    "bfloat16, untied, several files": {"dtype": "bfloat16", "max_shard_size": "50KB"},
    "bfloat16, tied, every head its own keys": {
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "float16, every head its own keys": {"dtype": "float16", "num_key_value_heads": 4},
    "float16, one key head, head_dim given": {"dtype": "float16", "num_key_value_heads": 1, "head_dim": 24},
    **{f"bfloat16, {name}": {"dtype": "bfloat16", **settings} for name, settings in TINY_FAMILIES.items()},
}


@pytest.mark.parametrize("settings", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_round_trip_through_megatron_is_bit_exact(settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**settings)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=150_000)
    assert_same_tensors(source, tmp_path / "back")


def test_special_values_travel_unchanged(tiny_llama: Tiny, tmp_path: Path) -> None:
    """-0.0, infinities, NaNs with their payload, and the smallest and largest numbers."""
    source = tmp_path / "source"
    source.mkdir()
    model = tiny_llama(dtype="bfloat16")
    tensors = stored_tensors(model)
    for tensor in tensors.values():
        bits = torch.arange(tensor.numel(), dtype=torch.int32).remainder(65536).to(torch.uint16)
        tensor.copy_(bits.view(torch.bfloat16).reshape(tensor.shape))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_bytes((model / "config.json").read_bytes())
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True, "dtype": "bfloat16"}, TINY_FAMILIES["qwen2"], TINY_FAMILIES["mixtral"]],
    ids=["untied", "tied", "qwen2", "mixtral"],
)
def test_expanding_during_conversion_equals_expanding_first(settings: dict, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model(**settings)
    hf_to_megatron(source, tmp_path / "megatron", expansion=ADDED)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "through")
    expand_hf(source, tmp_path / "direct", expansion=ADDED)
    assert_same_tensors(tmp_path / "through", tmp_path / "direct")
    assert Manifest.read(tmp_path / "through") == Manifest.read(tmp_path / "direct")


def test_added_blocks_are_copies_with_true_zeros(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama(num_hidden_layers=4)
    conversion = expand_hf(source, tmp_path / "expanded", expansion=ADDED)
    assert conversion.plan.added_layers == (2, 5)
    before, after = stored_tensors(source), stored_tensors(tmp_path / "expanded")
    parents = {0: 0, 1: 1, 2: 1, 3: 2, 4: 3, 5: 3}
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] != "layers":
            assert torch.equal(tensor, before[name])
        elif int(parts[2]) in (2, 5) and parts[4] in ("o_proj", "down_proj"):
            assert not tensor.view(torch.int32).any(), f"{name} is not +0.0"
        else:
            parts[2] = str(parents[int(parts[2])])
            assert torch.equal(tensor, before[".".join(parts)])


def test_zeroed_weights_ignore_infinities_in_the_source(damaged: Tiny, tmp_path: Path) -> None:
    """Multiplying infinity by zero would give NaN."""
    source = damaged()
    tensors = stored_tensors(source)
    tensors["model.layers.1.self_attn.o_proj.weight"].fill_(float("inf"))
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(-1.0)
    save_file(tensors, source / "model.safetensors")
    expand_hf(source, tmp_path / "expanded", expansion=ADDED)
    after = stored_tensors(tmp_path / "expanded")
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        assert not after[f"model.layers.2.{part}.weight"].view(torch.int32).any()


def test_the_same_plan_gives_the_same_bytes(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama()
    for name in ("one", "two"):
        expand_hf(source, tmp_path / name, expansion=ADDED, max_shard_bytes=100_000)
        hf_to_megatron(source, tmp_path / f"megatron-{name}", expansion=ADDED)
    for one, two in (("one", "two"), ("megatron-one", "megatron-two")):
        files = sorted(path.name for path in (tmp_path / one).iterdir())
        assert files == sorted(path.name for path in (tmp_path / two).iterdir())
        for file in files:
            assert (tmp_path / one / file).read_bytes() == (tmp_path / two / file).read_bytes(), file


def test_keys_are_those_of_megatrons_gpt_model(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(num_hidden_layers=1), tmp_path / "megatron")
    assert {name: tuple(tensor.shape) for name, tensor in read_with_torch(tmp_path / "megatron").items()} == {
        "embedding.word_embeddings.weight": (131, 64),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (64,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (128, 64),
        "decoder.layers.0.self_attention.linear_proj.weight": (64, 64),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (64,),
        "decoder.layers.0.mlp.linear_fc1.weight": (192, 64),
        "decoder.layers.0.mlp.linear_fc2.weight": (64, 96),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (131, 64),
    }


def test_experts_of_a_layer_are_one_tensor(tiny_model: Tiny, tmp_path: Path) -> None:
    """Shape [experts, rows, columns], gate rows before up rows. The norm before the router has two keys."""
    source = tiny_model(**TINY_FAMILIES["mixtral"], num_hidden_layers=1)
    hf_to_megatron(source, tmp_path / "megatron")
    stored, tensors = read_with_torch(tmp_path / "megatron"), stored_tensors(source)
    block, theirs = "decoder.layers.0.mlp.", "model.layers.0.block_sparse_moe."
    assert {name: tuple(tensor.shape) for name, tensor in stored.items() if "mlp" in name} == {
        "decoder.layers.0.pre_mlp_layernorm.weight": (64,),
        f"{block}linear_fc1.layer_norm_weight": (64,),
        f"{block}router.weight": (4, 64),
        f"{block}experts.experts.linear_fc1.weight": (4, 192, 64),
        f"{block}experts.experts.linear_fc2.weight": (4, 64, 96),
    }
    norm = tensors["model.layers.0.post_attention_layernorm.weight"]
    assert torch.equal(stored["decoder.layers.0.pre_mlp_layernorm.weight"], norm)
    assert torch.equal(stored[f"{block}linear_fc1.layer_norm_weight"], norm)
    fc1 = stored[f"{block}experts.experts.linear_fc1.weight"]
    gate_and_up = [tensors[f"{theirs}experts.2.{part}.weight"] for part in ("w1", "w3")]
    assert torch.equal(fc1[2], torch.cat(gate_and_up))


def test_every_expert_of_an_added_block_has_its_output_zeroed(tiny_model: Tiny, tmp_path: Path) -> None:
    expand_hf(tiny_model(**TINY_FAMILIES["mixtral"]), tmp_path / "expanded", expansion=ADDED)
    after = stored_tensors(tmp_path / "expanded")
    zeroed = {name for name, tensor in after.items() if not tensor.view(torch.int32).any()}
    assert zeroed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (2, 5)} | {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight" for layer in (2, 5) for expert in range(4)
    }
    router = "block_sparse_moe.gate.weight"
    assert torch.equal(after[f"model.layers.2.{router}"], after[f"model.layers.1.{router}"])


def test_qkv_rows_are_grouped_by_query_group(tiny_llama: Tiny, tmp_path: Path) -> None:
    """2 groups of 2 query heads: q0 q1 k0 v0, q2 q3 k1 v1, 16 rows each."""
    source = tiny_llama()
    hf_to_megatron(source, tmp_path / "megatron")
    merged = read_with_torch(tmp_path / "megatron")["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = (stored_tensors(source)[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(merged, torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]]))


def test_tokenizer_and_generation_config_travel_both_ways(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama()
    hf_to_megatron(source, tmp_path / "megatron", expansion=ADDED)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "megatron" / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_the_configuration_travels_with_its_layer_count_and_manifest(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama()
    hf_to_megatron(source, tmp_path / "megatron", expansion=ADDED)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    original, stored, exported = (
        json.loads((folder / "config.json").read_text())
        for folder in (source, tmp_path / "megatron", tmp_path / "back")
    )
    assert stored == {**original, "num_hidden_layers": 6}
    manifest = exported.pop("llamapro")
    assert exported == stored
    assert manifest == json.loads((tmp_path / "megatron" / "llamapro.json").read_text())


def test_layer_types_cover_the_added_layers(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama(**TINY_FAMILIES["qwen3, alternating windows"])
    expand_hf(source, tmp_path / "expanded", expansion=ADDED)
    config = json.loads((tmp_path / "expanded" / "config.json").read_text())
    assert [kind[0] for kind in config["layer_types"]] == ["f", "s", "s", "f", "s", "s"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_weights_and_records_it(dtype: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    source = tiny_llama()
    hf_to_megatron(source, tmp_path / "megatron", dtype=dtype)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = stored_tensors(tmp_path / "back")
    for name, tensor in stored_tensors(source).items():
        assert torch.equal(back[name], tensor.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype
    assert Manifest.read(tmp_path / "megatron").dtype == open_hf(tmp_path / "back").dtype == dtype


def test_a_cast_that_overflows_is_refused(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    tensors = stored_tensors(source)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = 7e4
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight .*float16"):
        hf_to_megatron(source, tmp_path / "megatron", dtype="float16")
    assert not (tmp_path / "megatron").exists()
    hf_to_megatron(source, tmp_path / "megatron", dtype="bfloat16")


def test_an_unknown_dtype_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'int8' is unknown: use one of float32, bfloat16, float16"):
        hf_to_megatron(tiny_llama(), tmp_path / "megatron", dtype="int8")


def test_rounds_accumulate_with_their_lineage(tiny_llama: Tiny, tmp_path: Path) -> None:
    """4 → 6 → 8 layers: hashes and numbering remain those of the first source."""
    source = tiny_llama()
    expand_hf(source, tmp_path / "first", expansion=ADDED)
    hf_to_megatron(tmp_path / "first", tmp_path / "second", expansion=Expansion.at(0, 7))
    manifest = Manifest.read(tmp_path / "second")
    assert manifest.plan.num_rounds == 2
    assert manifest.plan.added_layers == (0, 3, 6, 7)
    assert manifest.plan.newest_layers == (0, 7)
    assert manifest.source == Manifest.read(tmp_path / "first").source
    assert manifest.original_hashes.keys() == stored_tensors(source).keys()
    assert manifest.original_hashes == Manifest.read(tmp_path / "first").original_hashes


def test_known_extras_are_dropped(damaged: Tiny, tmp_path: Path) -> None:
    """Rotary buffers and the stored copy of a tied head are not separate weights."""
    source = damaged(tie_word_embeddings=True)
    tensors = stored_tensors(source)
    extras = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    extras["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, **extras}, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert stored_tensors(tmp_path / "back").keys() == tensors.keys()


OTHER_HEADS = {
    "other values": lambda embedding: embedding + 1,
    "another shape": lambda embedding: embedding[:130],
    "another type": lambda embedding: embedding.to(torch.bfloat16),
    "a number": lambda embedding: embedding[0, 0],
}


@pytest.mark.parametrize("other", OTHER_HEADS.values(), ids=OTHER_HEADS.keys())
def test_a_tied_head_stored_with_other_values_is_refused(
    other: Callable, damaged: Tiny, tiny_llama: Tiny, tmp_path: Path
) -> None:
    """transformers 5 uses it as the head, older versions do not. Dropping it would lose it."""
    source = damaged(tie_word_embeddings=True)
    tensors = stored_tensors(source)
    tensors["lm_head.weight"] = other(tensors["model.embed_tokens.weight"]).clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but config\.json"
    ):
        hf_to_megatron(source, tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
    expand_hf(tiny_llama(tie_word_embeddings=True), tmp_path / "it", expansion=ADDED)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        list(verify(source, tmp_path / "it"))


def test_progress_counts_every_byte(tiny_llama: Tiny, tmp_path: Path) -> None:
    seen: list[int] = []
    totals: list[int] = []
    options = Options(progress=seen.append, on_total=totals.append)
    conversion = hf_to_megatron(tiny_llama(), tmp_path / "megatron", options=options)
    assert totals == [sum(seen)] == [conversion.num_bytes]
    assert conversion.num_bytes == sum(t.nbytes for t in stored_tensors(tiny_llama()).values())
