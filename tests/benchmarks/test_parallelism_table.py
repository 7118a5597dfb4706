"""docs/cluster.md holds the table that the benchmark prints."""

from __future__ import annotations

from parallelism import rows
from recipes import ROOT


def test_the_page_holds_the_printed_table() -> None:
    table = "".join(f"{row}\n" for row in rows())
    assert table in (ROOT / "docs" / "cluster.md").read_text() and table.count("\n") == 2 + 3 * 4
