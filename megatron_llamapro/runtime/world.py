"""The world of ranks as a command needs it: started, with megatron.core ready, and stopped at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_llamapro.config.errors import LlamaProError
from megatron_llamapro.runtime.distributed import start_world, stop_world


@contextlib.contextmanager
def running_world(*, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Import megatron.core, make it fit this machine, and run a block in torch's started world.

    After an error on this rank alone the world is not stopped, because the others are in a collective.
    """
    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    cpu.install()
    start_world(timeout_minutes=timeout_minutes)
    try:
        yield
    except LlamaProError as raised:
        if raised.on_all_ranks:
            stop_world()
        raise
    stop_world()
