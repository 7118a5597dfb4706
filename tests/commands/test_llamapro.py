"""The front door finds every command and explains each at once. The old names in tools/ still work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_llamapro import __version__
from megatron_llamapro.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
SHIMS = sorted(ROOT.glob("tools/[!_]*.py"))


def run_python(
    *words: str, options: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run this Python with these words and return its exit code and output."""
    command = [sys.executable, *options, *words]
    environment = {**os.environ, **(variables or {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def run_llamapro(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Return exit code and output of `llamapro …`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["llamapro", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_the_console_script_points_at_this_program() -> None:
    [script] = entry_points(group="console_scripts", name="llamapro")
    assert script.load() is main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_package(name: str) -> None:
    """Its folder has an __init__.py, so the wheel includes it."""
    spec = find_spec(f"megatron_llamapro.{COMMANDS[name].module}")
    assert spec is not None and spec.origin is not None and Path(spec.origin).with_name("__init__.py").is_file()


def test_help_lists_all_commands_in_order(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run_llamapro(capsys, monkeypatch, "--help")
    listed = re.findall(r"^  ([\w-]+)  +(\S.*)$", out[out.index("commands:") :], re.MULTILINE)
    assert (code, listed) == (0, [(name, command.line) for name, command in COMMANDS.items()])
    assert all(len(line) <= 100 for line in out.splitlines())
    assert run_llamapro(capsys, monkeypatch) == (0, out, "")


def test_version_prints_the_version(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_llamapro(capsys, monkeypatch, "--version") == (0, f"megatron-llamapro {__version__}\n", "")


UNKNOWN = {
    "conver": "did you mean convert?",
    "convert_checkpoint": "did you mean convert?",
    "dry_run": "did you mean dry-run?",
    "pretrain": "did you mean train?",
    "plan": "did you mean plan-parallelism or plan-pipeline?",
    "frobnicate": "the commands are convert, expand, verify,",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_command_suggests_a_known_one(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, errors = run_llamapro(capsys, monkeypatch, name, "--source", "x")
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: argument COMMAND: '{name}' does not exist: {UNKNOWN[name]}")


def test_only_debug_may_stand_before_the_command(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, errors = run_llamapro(capsys, monkeypatch, "--debug", "inspect", "--checkpoint", "nowhere")
    assert (code, out) == (2, "") and "Traceback" in errors
    for words, message in (
        (["--config", "run.yaml"], "argument COMMAND: 'run.yaml' does not exist"),
        (["--fast", "train"], "unrecognized arguments: --fast"),
        (["--debug"], "the following arguments are required: COMMAND"),
    ):
        code, out, errors = run_llamapro(capsys, monkeypatch, *words)
        assert (code, out, errors.count("\n")) == (2, "", 1) and errors.startswith(f"error: {message}"), errors


ALL_HELP = """
import contextlib, sys
from megatron_llamapro.__main__ import run

for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        run([*name.split(), "--help"])
    print("imported:", *{"torch", "numpy", "transformers", "megatron.core"} & sys.modules.keys())
"""
DIRECTIONS = ("hf-to-megatron", "megatron-to-hf", "megatron-to-megatron", "hf-to-hf")
EXPLAINED = [*COMMANDS, *(f"convert {direction}" for direction in DIRECTIONS)]


@pytest.fixture(scope="module")
def explanations() -> dict[str, tuple[str, str]]:
    """Return the text of every `--help`, and the heavy modules imported by then."""
    done = run_python("-W", "error", "-c", ALL_HELP, *EXPLAINED)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(.*?)^imported:([^\n]*)\n", done.stdout, re.DOTALL | re.MULTILINE)
    return dict(zip(EXPLAINED, found, strict=True))


@pytest.mark.parametrize("name", EXPLAINED)
def test_help_has_an_example_and_imports_nothing_heavy(name: str, explanations: dict) -> None:
    """So `--help` starts at once."""
    text, heavy = explanations[name]
    assert heavy == ""
    assert text.startswith(f"usage: llamapro {name} ")
    assert re.search(rf"^(usage: )?llamapro {name}( [\w-]+)? --\w+ \S", text, re.MULTILINE)


def command_of(shim: Path) -> str:
    [name] = re.findall(r'^    _package\.run\("([\w-]+)"\)$', shim.read_text(), re.MULTILINE)
    return name


WITHOUT_AN_OLD_NAME = {"train", "evaluate", "sweep", "average", "extract", "compose", "generate-text", "rank-blocks"}


def test_every_command_keeps_its_old_name_in_tools() -> None:
    assert sorted(map(command_of, SHIMS)) == sorted(COMMANDS.keys() - WITHOUT_AN_OLD_NAME)


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.stem)
def test_an_old_name_runs_its_command(shim: Path, explanations: dict) -> None:
    """Both as `python tools/NAME.py` and as `python -m tools.NAME` in the repository's folder."""
    expected, _ = explanations[command_of(shim)]
    for words in (str(shim),), ("-m", f"tools.{shim.stem}"):
        done = run_python(*words, "--help")
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.stem)
def test_an_old_name_without_the_package_says_so(shim: Path) -> None:
    done = run_python(str(shim), "--help", options=["-S"], variables={"PYTHONPATH": ""})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(
        f"error: the module megatron_llamapro is not installed in this Python ({sys.executable}): "
    )
