"""The check against other tools: its table is complete, and transformers, the one tool installed, reads our exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from read_by_others import READERS, TOOLS
from venvs import VENVS

ROOT = Path(__file__).parents[2]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "read_by_others.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_transformers_reads_the_export(tmp_path: Path) -> None:
    ended = run("--tools", "transformers", "megatron-lm", "--venvs", tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    assert first.split()[:2] == ["ok", "transformers"]
    assert second.split()[:3] == ["not", "run", "megatron-lm"] and "--megatron_lm" in second
    assert list(tmp_path.iterdir()) == []


def test_every_tool_has_a_script_pins_and_a_mention_on_the_page() -> None:
    page = (ROOT / "docs" / "other_tools.md").read_text()
    for tool in TOOLS:
        assert (READERS / tool.script).is_file()
        assert tool.venv is None or tool.venv in VENVS
        assert f"`{tool.name}`" in page, tool.name
    for name, venv in VENVS.items():
        assert all(pin.count("==") == 1 for pin in venv.pins), name


def test_the_page_names_the_pinned_versions() -> None:
    page = (ROOT / "docs" / "other_tools.md").read_text()
    for name in {tool.venv for tool in TOOLS if tool.venv}:
        venv = VENVS[name]
        package, _, version = (venv.bare_packages or venv.packages)[0].partition("==")
        assert f"{package} {version}" in page


def test_a_folder_that_is_not_a_clone_is_a_usage_error(tmp_path: Path) -> None:
    ended = run("--tools", "megatron-lm", "--megatron_lm", tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "is not a clone of Megatron-LM" in ended.stderr and ended.stderr.count("\n") == 1
