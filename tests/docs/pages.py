"""Reads the code blocks of a page and runs its commands, unchanged, in a folder with the names the page uses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: str | Path, kind: str | None = None) -> list[str]:
    """Return the texts of a page's blocks: those of one kind (yaml, json, python), or all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if kind in (name, None)]


def lines(text: str) -> list[str]:
    """Return the lines of a block of commands: continued lines joined, comments removed."""
    found = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in found if line]


def commands(page: str) -> list[str]:
    """Return the commands of a page: the lines of its blocks without a kind."""
    return [line for text in blocks(page, "") for line in lines(text)]


def workplace(folder: Path) -> Path:
    """Link the repository's examples into `folder`, because commands name them."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run(command: str, folder: Path, *more: str, num_ranks: int = 1) -> str:
    """Run a page's command in `folder`, torchrun with this many ranks, and return its output."""
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        program_and_options = arguments[arguments.index("-m") :]
        arguments = ["--standalone", "--nproc-per-node", str(num_ranks), *program_and_options]
    here = Path(sys.executable)
    of_this_environment = {"python": here, **{name: here.with_name(name) for name in ("torchrun", "llamapro")}}
    words: Sequence[str | Path] = [of_this_environment.get(program, program), *arguments, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
