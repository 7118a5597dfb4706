"""Output that survives the loss of its reader during a run, for example a closed terminal or a killed `tee`."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

_NOBODY_READS = (errno.EPIPE, errno.EIO)


class _LastingFile(io.FileIO):
    """A file whose writes never fail. If the reader is gone, all later output is discarded; if the disk is full, only
    what does not fit."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _NOBODY_READS:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def keep_on_printing() -> None:
    """Make `print` never raise. An error would end the run before it is saved; its metrics are in a file as well."""
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
