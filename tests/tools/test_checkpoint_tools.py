"""The checkpoint tools as a user runs them: what they print, their exit codes, one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

Tiny = Callable[..., Path]
TOOLS = Path(__file__).parents[2] / "tools"
NAMES = ("convert", "expand", "verify", "inspect")


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(TOOLS / f"{tool}_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_well(tool: str, *arguments: object) -> str:
    """Its output; it must succeed and say nothing on standard error (no bar, where there is no terminal)."""
    ended = run(tool, *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


@pytest.fixture(scope="module")
def megatron(tiny_llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, converted by the tool, with blocks 2 and 5 added."""
    target = tmp_path_factory.mktemp("tools") / "megatron"
    said = run_well("convert", "hf-to-megatron", "--source", tiny_llama(), "--target", target, "--num_added_blocks", 2)
    assert said.startswith(f"{target}: 4 → 6 layers\nadded blocks: 2, 5\n808 kB of float32 weights in ")
    return target


def test_there_and_back_and_verified(megatron: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    run_well("convert", "megatron-to-hf", "--source", megatron, "--target", tmp_path / "back")
    run_well("expand", "--source", tiny_llama(), "--target", tmp_path / "direct", "--positions", "2,5")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()
    for expanded in (megatron, tmp_path / "back"):
        lines = run_well("verify", "--original", tiny_llama(), "--expanded", expanded).splitlines()
        assert len(lines) == 5
        assert all(line.startswith("ok ") for line in lines)


def test_verification_that_fails_is_exit_code_1_and_names_the_tensor(
    megatron: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    run_well("convert", "megatron-to-hf", "--source", megatron, "--target", tmp_path / "back")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "back" / "model.safetensors")
    ended = run("verify", "--original", tiny_llama(), "--expanded", tmp_path / "back")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "FAIL original tensors: model.norm.weight of 39 moved\n" in ended.stdout


def test_inspect(megatron: Path) -> None:
    assert "E o o A o o A H" in run_well("inspect", "--checkpoint", megatron)
    found = json.loads(run_well("inspect", "--checkpoint", megatron, "--json"))
    assert (found["num_layers"], found["added_layers"], found["dtype"]) == (6, [2, 5], "float32")


def test_placements(tiny_llama: Tiny, tmp_path: Path) -> None:
    expected = {"prefix": "0, 1", "suffix": "4, 5", "interleaved": "2, 5"}
    for placement, blocks in expected.items():
        options = ("--num_added_blocks", 2, "--placement", placement)
        said = run_well("expand", "--source", tiny_llama(), "--target", tmp_path / placement, *options)
        assert f"added blocks: {blocks}\n" in said


@pytest.mark.parametrize("tool", NAMES)
def test_help_imports_nothing_heavy(tool: str) -> None:
    """Which is what makes it start at once."""
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'megatron.core', 'transformers') if m in sys.modules])"
    )
    script = str(TOOLS / f"{tool}_checkpoint.py")
    ended = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("usage: ")
    assert ended.stdout.endswith("[]\n")


USAGE = {
    "positions and a count": (
        "expand",
        ("--num_added_blocks", 2, "--positions", "2,5"),
        "leave out --num_added_blocks",
    ),
    "positions and a placement": ("expand", ("--positions", "2,5", "--placement", "prefix"), "leave out --placement"),
    "positions and groups": ("expand", ("--positions", "2", "--blocks_per_group", 1), "leave out --blocks_per_group"),
    "a placement without a count": ("expand", ("--placement", "prefix"), "--placement needs --num_added_blocks"),
    "nothing to add": ("expand", (), "say which blocks to add"),
    "positions that are no numbers": ("expand", ("--positions", "2,x"), "'2,x' is not a list of layer indices"),
    "an unknown placement": ("expand", ("--placement", "middle"), "invalid choice: 'middle'"),
    "an unknown option": ("expand", ("--num_layers", 2), "unrecognized arguments: --num_layers 2"),
    "an unknown dtype": ("expand", ("--dtype", "int8"), "invalid choice: 'int8'"),
    "positions out of range": ("expand", ("--positions", "2,9"), "position 9 is out of range"),
    "positions twice": ("expand", ("--positions", "2,2"), "position 2 is given twice"),
    "positions unsorted": ("expand", ("--positions", "5,2"), "positions are not ascending"),
    "more blocks than fit": ("expand", ("--num_added_blocks", 5), "cannot add 5 blocks to 4 layers"),
}


@pytest.mark.parametrize(("tool", "options", "message"), USAGE.values(), ids=USAGE.keys())
def test_one_line_for_every_mistake(tool: str, options: tuple, message: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    ended = run(tool, "--source", tiny_llama(), "--target", tmp_path / "target", *options)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert message in ended.stderr
    assert list(tmp_path.iterdir()) == []


NOWHERE = {
    "convert to": ("convert", "hf-to-megatron", "--source", "nowhere", "--target", "out"),
    "convert from": ("convert", "megatron-to-hf", "--source", "nowhere", "--target", "out"),
    "verify": ("verify", "--original", "nowhere", "--expanded", "nowhere"),
    "inspect": ("inspect", "--checkpoint", "nowhere"),
}


@pytest.mark.parametrize("command", NOWHERE.values(), ids=NOWHERE.keys())
def test_a_folder_that_is_not_there(command: tuple[str, ...]) -> None:
    ended = run(*command)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: nowhere is not a folder") and ended.stderr.count("\n") == 1, ended.stderr


def test_an_existing_target_needs_overwrite(megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    command = ("convert", "megatron-to-hf", "--source", megatron, "--target", tmp_path)
    ended = run(*command)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "not empty" in ended.stderr and "--overwrite" in ended.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"
    run_well(*command, "--overwrite")
    assert not (tmp_path / "mine.txt").exists()
