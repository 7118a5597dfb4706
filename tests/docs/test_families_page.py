"""docs/families.md lists every family, and its code is in the source."""

from __future__ import annotations

import re

from pages import ROOT, blocks

from megatron_llamapro.families.hf_config import FAMILIES

PAGE = "docs/families.md"
SOURCES = ("families/hf_config.py", "testing/tiny_models.py", "checkpoint/tensors/weight_map.py")


def squeezed(code: str) -> str:
    return re.sub(r"[\s,]+", "", code)


def test_every_family_is_listed() -> None:
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", (ROOT / PAGE).read_text(), flags=re.MULTILINE)) == set(FAMILIES)


def test_its_code_is_in_the_source() -> None:
    sources = squeezed("".join((ROOT / "megatron_llamapro" / name).read_text() for name in SOURCES))
    shown = blocks(PAGE, "python")
    assert len(shown) == 3
    for block in shown:
        assert squeezed(block) in sources
