"""What torchrun tells a rank, and what a rank tells torchrun. Needs no torch.

torchrun ends with a report on the ranks that failed. The text of a rank's error file stands in it, of the first one at
its end (torch.distributed.elastic.multiprocessing.errors); without such a file, the link to a page.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from megatron_llamapro.config.files import write_atomically


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def tell_torchrun(message: str, *, details: str | None = None) -> None:
    """Write torchrun's error file, where there is one to write; `details` (a traceback) are shown instead of the
    message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": details or message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):  # what is printed says it as well
        write_atomically(Path(path), json.dumps({"message": {"message": message, "extraInfo": extra}}))
