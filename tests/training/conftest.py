"""megatron.core is imported without its warnings, which are errors here."""

from megatron_llamapro.testing import preload  # noqa: F401
