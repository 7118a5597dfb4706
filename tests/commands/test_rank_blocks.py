"""`rank-blocks` as a command: what it prints and writes, what an expansion at its positions copies, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import programs
from megatron_llamapro.testing.checkpoints import read_tensors

PROGRAM = ("-m", "megatron_llamapro")
SEQ_LENGTH = 32
SIZE = ("--seq_length", SEQ_LENGTH, "--num_samples", 2)


def rank_blocks(*arguments: object):
    return programs.run(*PROGRAM, "rank-blocks", *arguments)


@pytest.fixture(scope="module")
def ranked(models: Callable, token_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory):
    """The output of the command, and the folder of its files."""
    folder = tmp_path_factory.mktemp("ranked")
    sets = ("--known", f"b={token_files[1]}", "--new", f"a={token_files[0]}", *SIZE)
    files = ("--output", folder / "blocks.json", "--picture", folder / "blocks.png")
    done = rank_blocks("--checkpoint", models().original_hf, "--num_added_blocks", 2, *sets, *files)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_blocks_with_the_least_score_on_known_text_are_chosen(ranked) -> None:
    output, folder = ranked
    content = json.loads((folder / "blocks.json").read_text())
    scores = [entry["scores"]["b"]["left_out"] for entry in content["blocks"]]
    least = sorted(sorted(range(4), key=scores.__getitem__)[:2])
    assert content["chosen"] == least == [entry["block"] for entry in content["blocks"] if entry["chosen"]]
    assert content["positions"] == [least[0] + 1, least[1] + 2]
    rows = [line.split() for line in output.splitlines()[1:5]]
    assert [int(row[0]) for row in rows if row[-1] == "chosen"] == least
    assert [float(row[1]) for row in rows] == pytest.approx(scores, abs=5e-5)
    assert f"ranked: --positions {','.join(map(str, content['positions']))} takes " in output
    assert "interleaved: --positions 2,5 takes " in output
    assert (folder / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_the_costs_are_those_of_the_matrix_products(ranked) -> None:
    """The tiny model: hidden 64, feed-forward 96, 4 heads and 2 groups of 16, vocabulary 131. A block from the first
    added one on runs backward: as many products as forward for its linears, twice as many for its attention. The two
    added blocks also have weight gradients."""
    _, folder = ranked
    content = json.loads((folder / "blocks.json").read_text())
    linears = 2 * 64 * (64 + 2 * 32) + 2 * 64 * 64 + 2 * 64 * 2 * 96 + 2 * 96 * 64
    attention, head = 4 * (SEQ_LENGTH // 2) * 64, 2 * 64 * 131
    for name, first in (("ranked", content["positions"][0]), ("interleaved", 2)):
        backward = (6 - first) * (linears + 2 * attention) + head + 2 * linears
        assert content["training_flops_per_token"][name] == 6 * (linears + attention) + head + backward


def test_a_conversion_at_the_positions_copies_the_chosen_blocks(ranked, models: Callable, tmp_path: Path) -> None:
    content = json.loads((ranked[1] / "blocks.json").read_text())
    source, target = models().original_hf, tmp_path / "expanded"
    positions = ",".join(map(str, content["positions"]))
    words = ("convert", "hf-to-megatron", "--source", source, "--target", target, "--positions", positions)
    done = programs.run(*PROGRAM, *words)
    assert done.returncode == 0, done.stderr
    original, expanded = read_tensors(source), read_tensors(target)
    for block, position in zip(content["chosen"], content["positions"], strict=True):
        for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            copied = expanded[f"model.layers.{position}.{name}.weight"]
            assert torch.equal(copied, original[f"model.layers.{block}.{name}.weight"])
        assert not expanded[f"model.layers.{position}.mlp.down_proj.weight"].any()


def test_an_expanded_model_is_ranked_for_its_next_round(
    models: Callable, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its untrained added blocks, 2 and 5, change nothing, so they are the first to be chosen."""
    arguments = ("--known", f"b={token_files[1]}", *SIZE, "--by", "stream_change", "--output", tmp_path / "blocks.json")
    done = rank_blocks("--checkpoint", models().expanded_megatron, "--num_added_blocks", 2, *arguments)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "blocks.json").read_text())
    assert (content["by"], content["chosen"], content["positions"]) == ("stream_change", [2, 5], [3, 7])
    assert "of 8 blocks" in done.stdout


REFUSES = {
    "more blocks than there are": (["--num_added_blocks", "5"], "cannot add 5 blocks to 4 layers in one round"),
    "no block": (["--num_added_blocks", "0"], "num_added_blocks is 0: add at least 1 block"),
    "a set twice": (["--known", "b={b}", "b={a}"], "--known names 'b' twice"),
    "a set both new and known": (["--new", "b={b}"], "'b' is in --new and in --known"),
    "an unknown score": (["--by", "size"], "argument --by: invalid choice: 'size'"),
    "no such checkpoint": (["--checkpoint", "/nowhere"], "/nowhere"),
    "no such set": (["--known", "b=/nowhere/x"], "/nowhere/x.bin does not exist"),
    "no samples": (["--num_samples", "0"], "num_samples is 0: it must be at least 1"),
    "an existing picture": (["--picture", "{model}/config.json"], "exists: choose another file, or give --overwrite"),
}


@pytest.mark.parametrize("case", REFUSES)
def test_bad_options_are_refused_in_one_line(case: str, models: Callable, token_files: tuple[Path, Path]) -> None:
    arguments, message = REFUSES[case]
    places = {"model": models().original_hf, "a": token_files[0], "b": token_files[1]}
    given = ["--checkpoint", "{model}", "--known", "b={b}", "--num_added_blocks", "2", "--seq_length", "32", *arguments]
    refused(message, *(word.format(**places) for word in given))


def refused(message: str, *arguments: object) -> None:
    done = rank_blocks(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_a_known_set_and_a_number_are_needed(models: Callable, token_files: tuple[Path, Path]) -> None:
    arguments = ("--checkpoint", models().original_hf, "--new", f"a={token_files[0]}")
    refused("the following arguments are required: --known, --num_added_blocks", *arguments)


def test_a_model_without_a_loss_is_refused(models: Callable, token_files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(models().original_hf, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--checkpoint", folder, "--known", f"b={token_files[1]}", *SIZE, "--num_added_blocks", 1)
    refused("the loss of the set b is nan: the original needs a number there, to compare with", *arguments)
