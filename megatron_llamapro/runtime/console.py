"""A run's output, which may lose its reader while the run goes on: a closed terminal, a `tee` that was killed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

_NOBODY_READS = (errno.EPIPE, errno.EIO)


class _LastingFile(io.FileIO):
    """Where nobody reads any more, all goes nowhere from then on; what a full disk does not take is left out."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _NOBODY_READS:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def keep_on_printing() -> None:
    """Have `print` raise no errors: they would end a run, whose figures are in a file too, before it is saved."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO | None) -> TextIO | None:
    if stream is None:  # closed by the shell: >&-
        return None
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
    )
