"""Every command of every page names a tool that is there, and options that it has."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, lines

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md"), *ROOT.glob("examples/*/*.md")])
OF_A_RUN = {"--config", "--debug"}  # and all that have a dot: pretrain's, which some tools take too


def commands_of_ours(page: Path) -> list[str]:
    """Programs of this repository, with their options."""
    found = (line for text in blocks(page) for line in lines(text))
    return [
        match[1] for line in found if (match := re.search(r"python3? ((?:tools|benchmarks|examples)/\S+\.py.*)", line))
    ]


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
    done = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_are_known(page: Path) -> None:
    for command in commands_of_ours(page):
        words = command.split()
        program = tuple(words[:2] if words[0].endswith("convert_checkpoint.py") else words[:1])
        options = {word.partition("=")[0] for word in re.findall(r"(?<!\S)\[?(--[a-z][\w.=-]*)", command)}
        known = set(re.findall(r"--\w+", help_of(program))) | OF_A_RUN
        assert {option for option in options if "." not in option} <= known, command
