"""A page's blocks, and its commands, run as they stand where the page's names are."""

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
    """The texts of a page's blocks of one kind: yaml, json, python; or of all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if kind in (name, None)]


def lines(text: str) -> list[str]:
    """Of a block of commands: continued ones joined, without comments."""
    found = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in found if line]


def commands(page: str) -> list[str]:
    """What a page's blocks without a kind say to type."""
    return [line for text in blocks(page, "") for line in lines(text)]


def workplace(folder: Path) -> Path:
    """`folder`, with the repository's examples, which a page's commands name."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run(command: str, folder: Path, *more: str, num_ranks: int = 1) -> str:
    """Run a page's command in `folder`, of torchrun so many ranks on this machine; its output."""
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
