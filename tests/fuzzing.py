"""Settings of property tests that `make fuzz` runs with more examples, and other ones each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

IS_LONG = "FUZZ_EXAMPLES" in os.environ


def fuzz_settings(examples: int) -> settings:
    """`examples` of them, always the same ones; or as many as FUZZ_EXAMPLES says."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        derandomize=not IS_LONG,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
