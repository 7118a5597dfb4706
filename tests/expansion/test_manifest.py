"""Manifests are written whole and read strictly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.manifest import Manifest, Source, config_sha256
from megatron_llamapro.expansion.plan import ExpansionPlan

MANIFEST = Manifest(
    family="llama",
    dtype="bfloat16",
    plan=ExpansionPlan.unexpanded(4).expand((2, 5)).expand((0,)),
    source=Source(name="tiny", config_sha256="0" * 64, weight_bytes=1000),
    inits=("copy", "random"),
    init_seeds=(None, 7),
    original_hashes={"model.norm.weight": "1" * 64},
    tool_versions={"torch": "2.13.0"},
)


def test_a_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["llamapro.json"]


def test_a_manifest_from_before_seeds_were_recorded_is_read(tmp_path: Path) -> None:
    content = MANIFEST.to_json()
    del content["init_seeds"]
    (tmp_path / "llamapro.json").write_text(json.dumps(content))
    assert Manifest.read(tmp_path) == dataclasses.replace(MANIFEST, init_seeds=(None, None))


def test_a_cast_keeps_the_hashes_and_records_their_type(tmp_path: Path) -> None:
    """A cast manifest has format 2, so that older versions refuse it. Cast back, it is the original again, in format
    1."""
    cast = MANIFEST.stored_as("float32")
    assert (cast.dtype, cast.hash_dtype, cast.original_hashes) == ("float32", "bfloat16", MANIFEST.original_hashes)
    assert (cast.to_json()["format_version"], MANIFEST.to_json()["format_version"]) == (2, 1)
    cast.write(tmp_path)
    assert Manifest.read(tmp_path) == cast == MANIFEST.stored_as("float16").stored_as("float32")
    assert cast.stored_as("bfloat16") == MANIFEST


def test_the_hash_of_a_config_ignores_its_order() -> None:
    assert config_sha256({"a": 1, "b": [2]}) == config_sha256({"b": [2], "a": 1}) != config_sha256({"a": 1})


GOOD = MANIFEST.to_json()
LAYERS = GOOD["plan"]["layers"]
DAMAGED = {
    "no object": ([], "not a JSON object"),
    "another version": ({**GOOD, "format_version": 4}, "the manifest has format 4, this version reads 1, 2, 3"),
    "no version": ({}, "the manifest has format None"),
    "a missing field": ({k: v for k, v in GOOD.items() if k != "dtype"}, "manifest is damaged .*dtype"),
    "a type of the hashes that no weight has": (
        {**GOOD, "format_version": 2, "hash_dtype": "int4"},
        "manifest is damaged .*int4",
    ),
    "no type of the hashes": ({**GOOD, "format_version": 2}, "manifest is damaged .*hash_dtype"),
    "a plan that is none": ({**GOOD, "plan": {"layers": [], "num_rounds": 0}}, "manifest is damaged"),
    "a plan of many rounds": ({**GOOD, "plan": {**GOOD["plan"], "num_rounds": 3 * 10**9}}, "more rounds than layers"),
    "a plan with a parent that is not there": (
        {**GOOD, "plan": {**GOOD["plan"], "layers": [*LAYERS[:-1], {**LAYERS[-1], "parent_layer": 10**6}]}},
        "a layer's parent does not exist",
    ),
    "a plan of the wrong type": ({**GOOD, "plan": "interleaved"}, "manifest is damaged"),
    "a number for a type": ({**GOOD, "dtype": 16}, "manifest is damaged"),
    "a type that no weight has": ({**GOOD, "dtype": "int4"}, "manifest is damaged"),
    "a source of the wrong type": (
        {**GOOD, "source": {**GOOD["source"], "weight_bytes": "many"}},
        "manifest is damaged",
    ),
    "a source with another field": ({**GOOD, "source": {**GOOD["source"], "extra": 1}}, "manifest is damaged"),
    "an init too few": ({**GOOD, "inits": ["copy"]}, "manifest is damaged .*1 inits for 2 rounds"),
    "an init that is none": ({**GOOD, "inits": ["copy", "magic"]}, "manifest is damaged"),
    "a seed too few": ({**GOOD, "init_seeds": [7]}, "manifest is damaged .*1 seeds for 2 rounds"),
    "a seed that is no number": ({**GOOD, "init_seeds": [None, True]}, "manifest is damaged"),
    "seeds that are none": ({**GOOD, "init_seeds": 7}, "manifest is damaged"),
    "hashes that are a list": ({**GOOD, "original_hashes": []}, "manifest is damaged"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_manifests_are_refused_by_name(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "llamapro.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as refusal:
        Manifest.read(tmp_path)
    assert str(tmp_path / "llamapro.json") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_manifest_has_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no llamapro\.json: convert the model"):
        Manifest.read(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llamapro.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Manifest.read(tmp_path)


def test_a_manifest_is_frozen() -> None:
    assert dataclasses.replace(MANIFEST, dtype="float32").dtype == "float32"
    with pytest.raises(dataclasses.FrozenInstanceError):
        MANIFEST.dtype = "float32"  # type: ignore[misc]
