"""The errors a user can meet. A command prints one as a single `error: …` line and exits with 2 (`RunError`: 75,
`DivergedError`: 65)."""

SHORT_WRITE = "a file took a part of what was written: is the disk full, or a quota reached?"
"""Of libraries that say only how much of it they wrote."""


class LlamaProError(Exception):
    """What is wrong, where, and what to do, in one line."""

    on_all_ranks = False
    """Whether every rank of a distributed program raises it, so that one of them should say it."""
    on_all_of_node = False
    """Whether every rank of a node finds it by itself, in the same files, so that the node's first should say it."""


class ConfigError(LlamaProError):
    """The run's configuration cannot be what was meant."""


class ExpansionError(LlamaProError):
    """No expansion plan can be made from what was asked."""


class CheckpointError(LlamaProError):
    """A checkpoint is missing, damaged, of the wrong shape, or does not fit the model."""


class DataError(LlamaProError):
    """Text, tokens or tokenizer are missing, damaged, or do not match each other."""


class RunError(LlamaProError):
    """A run ended on its way, of what another start may not meet: a file system that failed, a full disk."""


class DivergedError(LlamaProError):
    """No step of a run could update anything, for too many in a row. Another start would end in the same step."""


class PipelinePlanError(LlamaProError):
    """Blocks cannot be laid on the pipeline stages as asked."""
