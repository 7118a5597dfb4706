"""Paths as people write them. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expand_user(text: str) -> str:
    """`text` with `~` or `~user` at its start replaced by that home folder.

    A folder that is really named `~` or `$HOME` is nobody's wish: a shell has replaced variables already, and a YAML
    file has none.

    Raises:
        ValueError: it is empty, names a user that does not exist or a variable, or has a character that no path has.
    """
    if not text:
        raise ValueError("it is empty: name a file or folder")
    if any(ord(character) < 32 for character in text):
        raise ValueError("it has a control character in it")
    if variable := _VARIABLE.search(text):
        raise ValueError(f"variables such as {variable[0]} are not replaced: write the path itself, or ~ for the home")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.split("/")[0]
        raise ValueError(
            f"no home folder is known for {user}: write the path itself (or ./{user} for that name)"
        ) from None
