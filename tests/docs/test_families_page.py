"""docs/families.md lists the families that there are, and shows code that is in the source."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_llamapro.model.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "families.md").read_text()
SOURCES = ("model/families.py", "testing/tiny_models.py", "checkpoint/weight_map.py")


def squeezed(code: str) -> str:
    return re.sub(r"[\s,]+", "", code)


def test_every_family_is_listed() -> None:
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(FAMILIES)


def test_its_code_is_the_sources() -> None:
    sources = squeezed("".join((ROOT / "megatron_llamapro" / name).read_text() for name in SOURCES))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert squeezed(block) in sources
