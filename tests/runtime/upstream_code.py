"""megatron.core's code behind the rows of `CHANGES`, and the table of docs/changes_to_megatron.md.

`python tests/runtime/upstream_code.py` writes the table and prints the fingerprints.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from megatron_llamapro.runtime.changes import CHANGES, VERSION, Change
from megatron_llamapro.runtime.upstream import import_megatron

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "changes_to_megatron.md"
_HEAD = ("| ours | megatron.core's | how | why | until |", "|---|---|---|---|---|")
_AT_VERSION = f"https://github.com/NVIDIA/Megatron-LM/blob/core_v{VERSION}/"


def fingerprint(row: Change, member: str) -> str:
    """Return the fingerprint of the source that a row replaces; for an import of megatron.core, of its package."""
    code = inspect.unwrap(getattr(resolve_name(row.upstream), member))
    package = code.__module__.partition(".")[0]
    if package != "megatron":
        return package
    return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:8]


def table() -> list[str]:
    return [*_HEAD, *map(_row, CHANGES)]


def _row(row: Change) -> str:
    module, _, name = row.ours.rpartition(".")
    owner = resolve_name(row.upstream)
    prefix = "" if isinstance(owner, ModuleType) else f"{owner.__name__}."
    members = ", ".join(_link(getattr(owner, member), f"{prefix}{member}") for member in row.replaces)
    ours = f"[`{name}`](../megatron_llamapro/{module.replace('.', '/')}.py)"
    return "| " + " | ".join((ours, members, row.how.name.lower(), row.why, row.until)) + " |"


def _link(member: Any, name: str) -> str:
    code = inspect.unwrap(member)
    if not code.__module__.startswith("megatron."):
        return f"`{name}`"
    path = code.__module__.replace(".", "/")
    return f"[`{name}`]({_AT_VERSION}{path}.py#L{inspect.getsourcelines(code)[1]})"


def with_table(page: str) -> str:
    """Return the page with a new table."""
    before, _, rest = page.partition(_HEAD[0])
    after = rest.partition("\n\n")[2]
    return before + "\n".join(table()) + "\n" + (f"\n{after}" if after else "")


if __name__ == "__main__":
    import_megatron()
    PAGE.write_text(with_table(PAGE.read_text()))
    for row in CHANGES:
        print(row.ours, {member: fingerprint(row, member) for member in row.replaces})
