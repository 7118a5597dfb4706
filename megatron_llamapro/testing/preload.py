"""The slow imports, which the fork server of `testing.distributed` does once. Starts no thread and no group."""

from megatron_llamapro.runtime.upstream import import_megatron

import_megatron()
