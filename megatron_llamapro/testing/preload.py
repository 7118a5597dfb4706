"""Imported once by the fork server of `testing.distributed`: the slow imports. Starts no thread and no group."""

from megatron_llamapro.runtime.upstream import import_megatron

import_megatron()
