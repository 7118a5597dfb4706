"""`evaluate` and `sweep` as commands: what they print and write, and what they refuse in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import programs

PROGRAM = ("-m", "megatron_llamapro")


def evaluate(*arguments: object):
    return programs.run(*PROGRAM, "evaluate", *arguments)


def sweep(*arguments: object):
    return programs.run(*PROGRAM, "sweep", *arguments)


def test_evaluate_prints_a_table_and_writes_json(
    models: Callable, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    made, output = models(), tmp_path / "losses.json"
    sets = ("--set", f"a={token_files[0]}", f"b={token_files[1]}", "--seq_length", 32, "--num_samples", 3)
    done = evaluate("--checkpoint", made.original_hf, made.expanded_megatron, *sets, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[1:]] == [
        ["a", made.original_hf.name],
        ["a", made.expanded_megatron.name],
        ["b", made.original_hf.name],
        ["b", made.expanded_megatron.name],
    ]
    content = json.loads(output.read_text())
    held = content["checkpoints"][1]["losses"]["b"]
    assert f"{held['loss']:.4f}" == rows[4][2] and held["tokens"] == 96
    assert math.isclose(held["perplexity"], math.exp(held["loss"]))
    assert math.isclose(held["bits_per_byte"], held["loss"] * 96 / held["bytes"] / math.log(2))
    assert content["sets"]["a"]["digest"] != content["sets"]["b"]["digest"]


def test_sweep_names_a_scale_and_draws(models: Callable, token_files: tuple[Path, Path], tmp_path: Path) -> None:
    """Blocks that are not trained change nothing at any scale, so the smallest is as good as the largest."""
    sets = ("--new", f"a={token_files[0]}", "--known", f"b={token_files[1]}", "--seq_length", 32, "--num_samples", 2)
    output, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    done = sweep(
        "--checkpoint",
        models().expanded_hf,
        *sets,
        "--scales",
        "0.5,1",
        "--output",
        output,
        "--picture",
        picture,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert [entry["scale"] for entry in content["scales"]] == [0.0, 0.5, 1.0]
    assert len({entry["losses"]["a"]["loss"] for entry in content["scales"]}) == 1
    assert content["choice"] == {"scale": 0.0, "gain": 0.0, "worst_known": 0.0}
    assert content["gain_at_no_loss"] == 0.0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_descending_sweep_stops_at_the_first_scale_within_the_tolerance(
    models: Callable, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Blocks that are not trained lose nothing, so the largest scale is within it."""
    sets = ("--new", f"a={token_files[0]}", "--known", f"b={token_files[1]}", "--seq_length", 32, "--num_samples", 2)
    output = tmp_path / "sweep.json"
    arguments = ("--checkpoint", models().expanded_hf, *sets, "--scales", "0.5,2,1", "--output", output)
    assert sweep(*arguments, "--descend").returncode == 0
    assert [entry["scale"] for entry in json.loads(output.read_text())["scales"]] == [0.0, 2.0]


def test_a_sweep_takes_the_original_from_a_reference(
    models: Callable, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    made, reference, output = models(), tmp_path / "original.json", tmp_path / "sweep.json"
    size = ("--seq_length", 32, "--num_samples", 2)
    a, b = (f"{name}={prefix}" for name, prefix in zip("ab", token_files, strict=True))
    assert not evaluate("--checkpoint", made.original_hf, "--set", a, b, *size, "--output", reference).returncode
    sets = ("--new", a, "--known", b)
    arguments = ("--checkpoint", made.expanded_hf, *sets, "--scales", "1", "--reference", reference)
    done = sweep(*arguments, *size, "--output", output)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(output.read_text())["scales"]
    assert (before["scale"], after["scale"]) == (0.0, 1.0)
    assert before["losses"] == json.loads(reference.read_text())["checkpoints"][0]["losses"]
    assert after["losses"]["a"]["loss"] == before["losses"]["a"]["loss"]
    for wrong, message in (
        (("--seq_length", 32, "--num_samples", 1), "its num_samples is 2, but here it is 1"),
        ((*size, "--precision", "bf16"), "it was evaluated in fp32, but here it is bf16"),
        ((*size, "--known", f"b={token_files[0]}"), "its set b has other tokens: evaluate the original again"),
        ((*size, "--known", f"c={token_files[0]}"), "it must be written by llamapro evaluate --output"),
    ):
        refused = sweep(*arguments, *wrong)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


EVALUATE_REFUSES = {
    "no such checkpoint": (["--checkpoint", "/nowhere", "--set", "a={a}"], "/nowhere"),
    "a word that is no set": (["--checkpoint", "{model}", "--set", "a"], "--set: 'a' is not NAME=PREFIX"),
    "a set twice": (["--checkpoint", "{model}", "--set", "a={a}", "a={b}"], "--set names 'a' twice"),
    "no such set": (
        ["--checkpoint", "{model}", "--set", "a=/nowhere/x", "--seq_length", "32"],
        "set a: /nowhere/x.bin does not exist",
    ),
    "samples that are too long": (
        ["--checkpoint", "{model}", "--set", "a={a}", "--seq_length", "100000"],
        "supports at most",
    ),
    "a negative number": (
        ["--checkpoint", "{model}", "--set", "a={a}", "--num_samples", "-1"],
        "num_samples is -1: it must be at least 1",
    ),
    "more tensor-parallel ranks than processes": (
        ["--checkpoint", "{model}", "--set", "a={a}", "--tensor_model_parallel_size", "2"],
        "1 rank cannot be divided into replicas of 2 tensor-parallel x 1 pipeline ranks",
    ),
    "two checkpoints of one name": (
        ["--checkpoint", "{model}", "{model}", "--label", "x", "x", "--set", "a={a}"],
        "have the same name",
    ),
    "text read as conversations": (
        ["--checkpoint", "{model}", "--set", "a={a}", "--format", "chat", "--seq_length", "32"],
        "holds text",
    ),
}


@pytest.mark.parametrize("case", EVALUATE_REFUSES)
def test_evaluate_refuses_in_one_line(case: str, models: Callable, token_files: tuple[Path, Path]) -> None:
    arguments, message = EVALUATE_REFUSES[case]
    _refused(evaluate, arguments, message, models, token_files)


SWEEP_REFUSES = {
    "a scale out of range": (["--scales", "0,3"], "'0,3' is not a list of scales from 0 to 2"),
    "no number": (["--scales", "a"], "'a' is not a list of scales"),
    "a set both new and known": (["--known", "a={a}"], "'a' is in --new and in --known"),
    "a negative tolerance": (["--tolerance", "-1"], "--tolerance is -1: it cannot be negative"),
    "nothing to dial": (["--checkpoint", "{original}"], "{original}"),
    "only the original": (["--scales", "0"], "--scales has only 0, the original: name a scale above it"),
    "a picture of no format": (["--picture", "{model}/x.doc"], "x.doc: the format must be one of "),
}


@pytest.mark.parametrize("case", SWEEP_REFUSES)
def test_sweep_refuses_in_one_line(case: str, models: Callable, token_files: tuple[Path, Path]) -> None:
    arguments, message = SWEEP_REFUSES[case]
    given = ["--checkpoint", "{expanded}", "--new", "a={a}", "--known", "b={b}", "--seq_length", "32", *arguments]
    _refused(sweep, given, message, models, token_files)


def test_sweep_needs_a_known_set(models: Callable, token_files: tuple[Path, Path]) -> None:
    arguments = ["--checkpoint", "{expanded}", "--new", "a={a}"]
    _refused(sweep, arguments, "the following arguments are required: --known", models, token_files)


def _refused(
    command: Callable, arguments: list[str], message: str, models: Callable, token_files: tuple[Path, Path]
) -> None:
    made = models()
    places = {
        "model": made.original_hf,
        "original": made.original_hf,
        "expanded": made.expanded_hf,
        "a": token_files[0],
        "b": token_files[1],
    }
    done = command(*(word.format(**places) for word in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message.format(**places) in done.stderr


def test_an_existing_file_is_not_replaced(models: Callable, token_files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "losses.json"
    output.write_text("mine")
    done = evaluate("--checkpoint", models().original_hf, "--set", f"a={token_files[0]}", "--output", output)
    assert done.returncode == 2 and "exists: choose another file, or give --overwrite" in done.stderr
    assert output.read_text() == "mine"
