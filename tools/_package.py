"""What every script of this folder does: it runs a command of `llamapro`, with the same options."""

from __future__ import annotations

import sys
from typing import NoReturn


def run(command: str) -> NoReturn:
    """Run the command. Where this Python lacks the package, one line says so instead of a traceback."""
    try:
        from megatron_llamapro.__main__ import main
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"error: the module {error.name} is not in this Python ({sys.executable}): activate the environment that "
            "megatron_llamapro is installed in, or install it (pip install -e . in its folder)",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    main(command)
