"""The commands on checkpoints as a user types them: their output, exit codes, and one line for every mistake."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_llamapro.__main__ import main

Tiny = Callable[..., Path]
LLAMAPRO = ("-m", "megatron_llamapro")


@dataclass(frozen=True)
class Ended:
    """The exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: `run("expand", "--source", …)`."""

    def run_command(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["llamapro", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run_command


@pytest.fixture
def run_well(run: Run) -> Callable[..., str]:
    """Run a command and return its output. It must succeed with an empty standard error: no bar without a terminal."""

    def run_command_well(*words: object) -> str:
        ended = run(*words)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    return run_command_well


def run_as_a_program(*words: object) -> Ended:
    """Run a command in its own process."""
    command = [sys.executable, "-W", "error", *LLAMAPRO, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def lines_on_a_terminal(*words: object) -> list[str]:
    """Return the lines that a terminal of 100 columns shows once a command has ended."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, *LLAMAPRO, *map(str, words)]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the process that held the other end has ended
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written
    assert re.search(rb"\[\d\d:\d\d(<.*)?, .*B/s\]", written), "no bar was shown"  # it shows the time and the rate
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in written.decode().split("\n")]


@pytest.fixture(scope="module")
def megatron(tiny_llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with blocks 2 and 5 added, converted by the command."""
    target = tmp_path_factory.mktemp("commands") / "megatron"
    options = ("--source", tiny_llama(), "--target", target, "--num_added_blocks", 2)
    ended = run_as_a_program("convert", "hf-to-megatron", *options)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{target}: 4 → 6 layers\nadded blocks: 2, 5\n808 kB of float32 weights in ")
    return target


def test_both_directions_agree_and_verify(
    run_well: Callable[..., str], megatron: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    run_well("convert", "megatron-to-hf", "--source", megatron, "--target", tmp_path / "back")
    run_well("expand", "--source", tiny_llama(), "--target", tmp_path / "direct", "--positions", "2,5")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()
    for expanded in (megatron, tmp_path / "back"):
        lines = run_well("verify", "--original", tiny_llama(), "--expanded", expanded).splitlines()
        assert len(lines) == 5
        assert all(line.startswith("ok ") for line in lines)


def test_the_progress_bar_is_cleared_before_the_summary(megatron: Path, tiny_llama: Tiny, tmp_path: Path) -> None:
    expand = ("--source", tiny_llama(), "--target", tmp_path / "hf", "--positions", "2,5")
    convert = ("megatron-to-hf", "--source", megatron, "--target", tmp_path / "back")
    assert lines_on_a_terminal("expand", *expand)[:2] == [f"{tmp_path}/hf: 4 → 6 layers", "added blocks: 2, 5"]
    assert lines_on_a_terminal("convert", *convert)[:2] == [f"{tmp_path}/back: 6 layers", "added earlier: 2, 5"]
    lines = lines_on_a_terminal("verify", "--original", tiny_llama(), "--expanded", megatron)
    assert [line[:5] for line in lines if line] == ["ok   "] * 5


def test_a_failed_verification_exits_with_1_and_names_the_tensor(
    run: Run, run_well: Callable[..., str], megatron: Path, tiny_llama: Tiny, tmp_path: Path
) -> None:
    run_well("convert", "megatron-to-hf", "--source", megatron, "--target", tmp_path / "back")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "back" / "model.safetensors")
    ended = run("verify", "--original", tiny_llama(), "--expanded", tmp_path / "back")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "FAIL original tensors: model.norm.weight of 39 moved\n" in ended.stdout


def test_a_changed_bit_of_a_zeroed_weight_fails_as_untrained(
    run: Run, run_well: Callable[..., str], tiny_llama: Tiny, tmp_path: Path
) -> None:
    settings = ("--target", tmp_path / "it", "--positions", "2", "--init", "mean")
    run_well("expand", "--source", tiny_llama(), *settings)
    models = ("--original", tiny_llama(), "--expanded", tmp_path / "it")
    assert "2: identity, as when added" in run_well("verify", *models, "--quick", "--trained", "nothing")
    tensors = load_file(tmp_path / "it" / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e-45
    save_file(tensors, tmp_path / "it" / "model.safetensors")
    assert "2: trained" in run_well("verify", *models, "--quick")
    ended = run("verify", *models, "--quick", "--trained", "nothing")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "FAIL added blocks: block 2: model.layers.2.mlp.down_proj.weight is not zero\n" in ended.stdout


def test_a_second_round_lists_new_and_earlier_blocks(
    run_well: Callable[..., str], megatron: Path, tmp_path: Path
) -> None:
    options = ("--source", megatron, "--target", tmp_path / "it", "--num_added_blocks", 2)
    said = run_well("convert", "megatron-to-megatron", *options)
    assert said.startswith(f"{tmp_path}/it: 6 → 8 layers\nadded blocks: 3, 7\nadded earlier: 2, 6\n")


def test_inspect_prints_a_drawing_or_json(run_well: Callable[..., str], megatron: Path) -> None:
    assert "E o o A o o A H" in run_well("inspect", "--checkpoint", megatron)
    found = json.loads(run_well("inspect", "--checkpoint", megatron, "--json"))
    assert (found["num_layers"], found["added_layers"], found["dtype"]) == (6, [2, 5], "float32")


def test_placements_decide_the_positions_of_added_blocks(
    run_well: Callable[..., str], tiny_llama: Tiny, tmp_path: Path
) -> None:
    expected = {"prefix": "0, 1", "suffix": "4, 5", "interleaved": "2, 5"}
    for placement, blocks in expected.items():
        options = ("--num_added_blocks", 2, "--placement", placement)
        said = run_well("expand", "--source", tiny_llama(), "--target", tmp_path / placement, *options)
        assert f"added blocks: {blocks}\n" in said


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
    "an option misspelt": ("expand", ("--num_added_block", 2), "did you mean --num_added_blocks? (see "),
    "a seed of nothing": ("expand", ("--num_added_blocks", 2, "--init_seed", 1), "--init_seed is for --init random"),
    "threads in another script": ("expand", ("--num_workers", "²"), "'²' is not a number of threads"),
    "an unknown dtype": ("expand", ("--dtype", "int8"), "invalid choice: 'int8'"),
    "positions out of range": ("expand", ("--positions", "2,9"), "position 9 is out of range"),
    "positions twice": ("expand", ("--positions", "2,2"), "position 2 is given twice"),
    "positions unsorted": ("expand", ("--positions", "5,2"), "positions are not ascending"),
    "more blocks than fit": ("expand", ("--num_added_blocks", 5), "cannot add 5 blocks to 4 layers"),
}


@pytest.mark.parametrize(("command", "options", "message"), USAGE.values(), ids=USAGE.keys())
def test_every_mistake_is_one_line(
    run: Run, command: str, options: tuple, message: str, tiny_llama: Tiny, tmp_path: Path
) -> None:
    ended = run(command, "--source", tiny_llama(), "--target", tmp_path / "target", *options)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert message in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained(tiny_llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face model with added blocks 2 and 5, of which the output projections are trained."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    ended = run_as_a_program("expand", "--source", tiny_llama(), "--target", folder, "--positions", "2,5")
    assert ended.returncode == 0, ended.stderr
    tensors = load_file(folder / "model.safetensors")
    for layer in (2, 5):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"] += 0.25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_dialed_export_is_proven(
    run: Run, run_well: Callable[..., str], trained: Path, tmp_path: Path, tiny_llama: Tiny
) -> None:
    target = tmp_path / "dialed"
    dial = ("convert", "hf-to-hf", "--source", trained, "--target", target, "--added_block_scale", "0.5,0")
    assert "dialed × 0.5, 0: 4 tensors, as llamapro.json records" in run_well(*dial)
    found = load_file(target / "model.safetensors")
    for layer, value in ((2, 0.125), (5, 0)):
        assert (found[f"model.layers.{layer}.mlp.down_proj.weight"] == value).all()
    prove = ("verify", "--original", tiny_llama(), "--expanded", target, "--undialed", trained)
    assert "ok   dial: 4 tensors are × 0.5, 0 of " in run_well(*prove)
    assert "dialed          × 0.5, 0 (4 tensors)" in run_well("inspect", "--checkpoint", target)
    assert json.loads(run_well("inspect", "--checkpoint", target, "--json"))["dial"]["added_block_scale"] == [0.5, 0]


DIALS = {
    "below 0": (("--added_block_scale", "-1"), "added_block_scale is -1: it must be from 0"),
    "nan": (("--added_block_scale", "nan"), "added_block_scale is nan: it must be from 0"),
    "above 2": (("--added_block_scale", "0.5,3"), "added_block_scale is 3: it must be from 0"),
    "too many": (("--added_block_scale", "0.5,1,1"), "has 3 values, but the model has 2 added blocks"),
    "no number": (("--added_block_scale", "0.5,x"), "'0.5,x' is not a list of scales such as 0.75"),
    "only an original": (("--original", "nowhere"), "--original needs --added_block_scale"),
    "no original": (("--added_block_scale", "0.5", "--original", "nowhere"), "nowhere is not a folder"),
    "another original": (("--added_block_scale", "0.5", "--original", "."), "config.json"),
}


@pytest.mark.parametrize(("options", "message"), DIALS.values(), ids=DIALS.keys())
def test_a_wrong_dial_is_one_line(run: Run, options: tuple, message: str, trained: Path, tmp_path: Path) -> None:
    ended = run("convert", "hf-to-hf", "--source", trained, "--target", tmp_path / "target", *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert message in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dial_of_nothing_is_one_line(run: Run, tiny_llama: Tiny, trained: Path, tmp_path: Path) -> None:
    dial = ("--target", tmp_path / "target", "--added_block_scale", "0.5")
    ended = run("convert", "hf-to-hf", "--source", tiny_llama(), *dial)
    assert ended.returncode == 2 and "has no llamapro.json, so nothing says what was trained" in ended.stderr
    ended = run("convert", "hf-to-hf", "--source", trained, *dial, "--original", tiny_llama(seed=1))
    assert ended.returncode == 2 and f"{tiny_llama(seed=1)} is not the original of {trained}" in ended.stderr
    ended = run("verify", "--original", tiny_llama(), "--expanded", trained, "--undialed", trained)
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {trained} is not dialed")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_how_to_resume(
    run: Run, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    command = ("convert", "hf-to-megatron", "--source", tiny_llama(), "--target", tmp_path / "it")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_llamapro.checkpoint.convert.transfer", interrupted)
        ended = run(*command)
    assert ended == Ended(130, "", "error: interrupted: to continue, run the same command with --resume\n")
    assert [path.name for path in tmp_path.iterdir()] == [".it.partial"]
    assert run(*command, "--resume").returncode == 0


NOWHERE = {
    "convert to": ("convert", "hf-to-megatron", "--source", "nowhere", "--target", "out"),
    "convert from": ("convert", "megatron-to-hf", "--source", "nowhere", "--target", "out"),
    "verify": ("verify", "--original", "nowhere", "--expanded", "nowhere"),
    "inspect": ("inspect", "--checkpoint", "nowhere"),
}


@pytest.mark.parametrize("command", NOWHERE.values(), ids=NOWHERE.keys())
def test_a_missing_folder_is_refused(run: Run, command: tuple[str, ...]) -> None:
    ended = run(*command)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: nowhere is not a folder") and ended.stderr.count("\n") == 1, ended.stderr


def test_a_mistake_is_one_line_in_a_real_process(tiny_llama: Tiny, tmp_path: Path) -> None:
    options = ("--source", tiny_llama(), "--target", tmp_path / "target", "--positions", "2,9")
    ended = run_as_a_program("convert", "hf-to-megatron", *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: position 9 is out of range") and ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_needs_overwrite(
    run: Run, run_well: Callable[..., str], megatron: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    command = ("convert", "megatron-to-hf", "--source", megatron, "--target", tmp_path)
    ended = run(*command)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "not empty" in ended.stderr and "--overwrite" in ended.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"
    run_well(*command, "--overwrite")
    assert not (tmp_path / "mine.txt").exists()
