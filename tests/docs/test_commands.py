"""Every command on every page exists and has the options shown."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from pages import ROOT, blocks, lines, run

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md"), *ROOT.glob("examples/*/*.md")])
OURS = re.compile(r"(?<!\S)(?:llamapro|python (?:benchmarks|examples)/\S+\.py) .*|(?<!\S)python tools/.*")
OF_A_RUN = {"--config", "--debug"}  # and all options with a dot: the run's, which some commands accept too


def commands_of_ours(page: Path) -> list[str]:
    """Return the commands of this repository on a page, with their options."""
    found = (line for text in blocks(page) for line in lines(text))
    return [match[0] for line in found if (match := OURS.search(line))]


@functools.cache
def help_of(program: str) -> str:
    return run(f"{program} --help", ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_are_known(page: Path) -> None:
    for command in commands_of_ours(page):
        words = command.split()
        program = " ".join(words[:3] if words[1] == "convert" else words[:2])
        assert not program.startswith("python tools/"), "llamapro has this command"
        options = {word.partition("=")[0] for word in re.findall(r"(?<!\S)\[?(--[a-z][\w.=-]*)", command)}
        known = set(re.findall(r"--\w+", help_of(program))) | OF_A_RUN
        assert {option for option in options if "." not in option} <= known, command


def test_the_pages_have_more_than_ten_commands() -> None:
    assert len({command.split()[1] for page in PAGES for command in commands_of_ours(page)}) > 10
