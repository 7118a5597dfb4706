"""Steps as a user names them: 700, or 1200-1215. Imports neither torch nor megatron."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.schema import TrainingConfig

_STEPS = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


def left_out(training: TrainingConfig) -> Sequence[range]:
    """The steps that `skip_iterations` names.

    Raises:
        ConfigError: an entry is neither a step of the run nor a first and a last one.
    """
    return [_steps(str(entry), training.train_iters) for entry in training.skip_iterations]


def is_left_out(iteration: int, training: TrainingConfig) -> bool:
    """Whether `skip_iterations` names this step."""
    return any(iteration in steps for steps in left_out(training))


def _steps(entry: str, train_iters: int) -> range:
    found = _STEPS.fullmatch(entry)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= train_iters:
        raise ConfigError(
            f"training.skip_iterations has {entry}: name steps from 1 to train_iters ({train_iters}), one (7) or the "
            "first and the last of several (7-9)"
        )
    return range(first, last + 1)
