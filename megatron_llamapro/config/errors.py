"""The errors that a user can meet. A command prints an error as one `error: …` line and exits with 2 (`RunError`: 75,
`DivergedError`: 65)."""

SHORT_WRITE = "only part of the data was written: the disk may be full, or a quota reached"
"""The reason to give if a library says only how much it wrote."""


class LlamaProError(Exception):
    """An error that a user can fix. Its text says in one line what is wrong, where, and what to do."""

    on_all_ranks = False
    """Whether every rank of a distributed program raises it. Then only one rank should print it."""
    on_all_of_node = False
    """Whether every rank of a node finds it by itself, in the same files. Then only the node's first prints it."""


class ConfigError(LlamaProError):
    """The run's configuration is invalid."""


class ExpansionError(LlamaProError):
    """The request allows no expansion plan."""


class CheckpointError(LlamaProError):
    """A checkpoint is missing, damaged, has the wrong shape, or does not fit the model."""


class DataError(LlamaProError):
    """Text, tokens or a tokenizer are missing or damaged, or do not match each other."""


class RunError(LlamaProError):
    """A run ended early because of a failure that a restart may not hit, for example a full disk."""


class DivergedError(LlamaProError):
    """Too many steps in a row could not update the model. A restart would end in the same step."""


class PipelinePlanError(LlamaProError):
    """The blocks cannot be placed on the pipeline stages as requested."""
