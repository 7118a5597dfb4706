"""Steps without an update: what is told of them, and when there are too many.

The step counts: its data are consumed and the schedule goes on, so that every other step has the data and the learning
rate that it would have had. Weights, main parameters, moments and their step counts stay as they were, bit for bit.
"""

from __future__ import annotations

from megatron_llamapro.config.errors import DivergedError
from megatron_llamapro.runtime.distributed import for_all_ranks
from megatron_llamapro.training.state import Outcome, TrainingState
from megatron_llamapro.training.step import StepResult


def skip_record(result: StepResult, state: TrainingState) -> dict[str, object]:
    """The `skip` record of a step that was the latest."""
    return {
        "kind": "skip",
        "iteration": state.iteration,
        "outcome": result.outcome.value,
        "loss": result.loss.loss,
        "grad_norm": result.grad_norm,
        "tokens": result.loss.num_tokens,
        "learning_rate": result.learning_rate,
        "skipped_steps": len(state.skipped_steps),
        "skipped_in_a_row": state.skipped_in_a_row,
        "consumed_samples": state.consumed_samples,
    }


def check_converges(result: StepResult, state: TrainingState, *, max_skipped_steps: int) -> None:
    """Raise `DivergedError`, on all ranks, after the last of too many steps in a row that were skipped."""
    if result.outcome is not Outcome.SKIPPED or state.skipped_in_a_row < max_skipped_steps:
        return
    why = f"the loss is {result.loss.loss:.4g} and the gradient norm {result.grad_norm:.4g}"
    if not result.loss.num_tokens:
        why = "no token has loss (look at the data's loss_mask)"
    raise for_all_ranks(
        DivergedError(
            f"step {state.iteration}: {why}; steps in a row without an update: {state.skipped_in_a_row}, as many as "
            "training.max_skipped_steps: lower optimizer.lr, or name steps whose data are bad in "
            "training.skip_iterations; the last checkpoint is intact"
        )
    )
