"""Imported first by every tool: one line, not a traceback, where this Python lacks the package or what it needs."""

from __future__ import annotations

import os
import sys


def _say_what_is_missing(kind: type[BaseException], error: BaseException, traceback) -> None:
    if not isinstance(error, ModuleNotFoundError) or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, traceback)
        return
    print(
        f"error: the module {error.name} is not in this Python ({sys.executable}): activate the environment that "
        "megatron_llamapro is installed in, or install it (pip install -e . in its folder)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


sys.excepthook = _say_what_is_missing
