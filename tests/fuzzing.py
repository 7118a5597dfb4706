"""Settings for property tests of bad input: `make test` runs few fixed examples, `make fuzz` many random ones.

    @fuzz_settings(100)
    @given(...)
    def test_damaged_files_end_well(...): ...

`make fuzz` finds a file by its import of `fuzz_settings`; `make test-fast` leaves it out (tests/fast.py).
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

IS_LONG = "FUZZ_EXAMPLES" in os.environ


def fuzz_settings(examples: int) -> settings:
    """Return settings for `examples` fixed examples, or for FUZZ_EXAMPLES random ones if that variable is set."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        derandomize=not IS_LONG,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
