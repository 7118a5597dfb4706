"""Numbers as a terminal shows them."""

from __future__ import annotations

import pytest

from megatron_llamapro.checkpoint.report import size_text

SIZES = {
    0: "0 B",
    999: "999 B",
    1000: "1 kB",
    1_234_567: "1.23 MB",
    999_400_000: "999 MB",
    999_600_000: "1 GB",
    13_500_000_000: "13.5 GB",
    2_000_000_000_000: "2 TB",
}


@pytest.mark.parametrize(("num_bytes", "text"), SIZES.items())
def test_sizes_have_three_digits_and_no_exponent(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
