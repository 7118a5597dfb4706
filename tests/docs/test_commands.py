"""Every command of every page names a tool that is there, and options that it has."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md"), *ROOT.glob("examples/*/*.md")])
OF_A_RUN = {"--config", "--debug"}  # and all that have a dot: pretrain's, which some tools take too


def commands(page: Path) -> list[str]:
    """Lines of its blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (
        re.search(r"python3? ((?:tools|benchmarks|examples)/\S+\.py.*)", re.sub(r"\s#.*", "", line)) for line in lines
    )
    return [match[1] for match in found if match]


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
    done = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_are_known(page: Path) -> None:
    for command in commands(page):
        words = command.split()
        program = tuple(words[:2] if words[0].endswith("convert_checkpoint.py") else words[:1])
        options = {word.partition("=")[0] for word in re.findall(r"(?<!\S)\[?(--[a-z][\w.=-]*)", command)}
        known = set(re.findall(r"--\w+", help_of(program))) | OF_A_RUN
        assert {option for option in options if "." not in option} <= known, command
