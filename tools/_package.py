"""Runs a command of `llamapro` with the same options, for every script of this folder."""

from __future__ import annotations

import sys
from typing import NoReturn


def run(command: str) -> NoReturn:
    """Run the command. If this Python lacks the package, print one line instead of a traceback."""
    try:
        from megatron_llamapro.__main__ import main
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"error: the module {error.name} is not installed in this Python ({sys.executable}): activate the "
            "environment that megatron_llamapro is installed in, or install it (pip install -e . in its folder)",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    main(command)
