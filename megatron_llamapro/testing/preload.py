"""The slow imports, which the fork server of `testing.distributed` does once. Starts no thread and no group."""

from __future__ import annotations

import gc

from megatron_llamapro.runtime.upstream import import_megatron

import_megatron()

from megatron_llamapro.training import loop, setup  # noqa: E402, F401 (megatron.core's warnings are silenced by now)

# Every save of megatron.core collects garbage: without this, in each rank through all that was imported.
gc.collect()
gc.freeze()
