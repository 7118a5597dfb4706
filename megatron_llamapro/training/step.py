"""One optimizer step, and the forward pass that evaluation shares with it. megatron.core's schedules do the work.

A step without an update still counts: it consumes its data and advances the learning-rate schedule, so every other step
keeps its data and its learning rate. Weights, main parameters, moments and their step counts stay unchanged, bit for
bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_llamapro.config.errors import DivergedError
from megatron_llamapro.model.penalty import BlockPenalty, penalties_of, penalty_arguments
from megatron_llamapro.optimizer.update import gradient_norm, update
from megatron_llamapro.runtime.distributed import ParallelLayout, for_all_ranks
from megatron_llamapro.training.checkpoints.state import Outcome, TrainingState
from megatron_llamapro.training.communication import communication
from megatron_llamapro.training.machine import Machine

Batch = dict[str, torch.Tensor]
"""tokens, labels, loss_mask, position_ids: [b, s] each. known, if the penalty is on known sources only: [b]."""


@dataclass(frozen=True)
class LossSum:
    """The loss over all tokens that count, of all ranks."""

    loss: float
    """Mean loss per token, in nats; NaN if no token counts."""
    num_tokens: int
    penalty: float | None = None
    """What the penalty on added blocks adds to the loss, divided by its weight; None if there is none."""
    stop_requested: bool = False
    """Whether any rank was asked to stop."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; the same on every rank."""

    loss: LossSum
    grad_norm: float
    """Global norm over all trainable parameters, before clipping."""
    learning_rate: float
    """The learning rate of the step, even if it updated nothing."""
    outcome: Outcome


def train_step(
    machine: Machine,
    batches: Sequence[Iterator[Batch]],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    stop_requested: Callable[[], bool] = lambda: False,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Run the forward and backward passes, clip the gradients, update. `batches` holds one iterator per model chunk,
    all over the same micro-batches. `before_update` is called when all gradients are computed, and
    `stop_requested` after that.

    If the loss or the gradient norm is not finite, nothing is updated. The same holds for a norm of exactly 0: a model
    that diverged may have hidden states so large that the final norm returns zeros. Loss and norm are reduced over all
    ranks, so all ranks agree.
    """
    for chunk in machine.chunks:
        chunk.zero_grad_buffer()
    machine.optimizer.zero_grad()
    penalties = penalties_of(machine.chunks)
    for penalty in penalties:
        penalty.restart()
    sums = run_microbatches(
        machine.chunks,
        batches,
        num_microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        forward_only=False,
    )
    if before_update is not None:
        before_update()
    loss = reduce_loss(sums, layout=machine.layout, penalties=penalties, stop_requested=stop_requested())
    grad_norm = gradient_norm(machine.optimizer)
    usable = math.isfinite(loss.loss) and math.isfinite(grad_norm) and grad_norm > 0
    if usable:
        update(machine.optimizer, grad_norm=grad_norm)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=_end_step(machine),
        outcome=Outcome.UPDATED if usable else Outcome.SKIPPED,
    )


def leave_out_step(machine: Machine, *, stop_requested: bool) -> StepResult:
    """Take a step that only advances the schedule: it reads and computes nothing. `stop_requested` is on any rank."""
    return StepResult(
        loss=LossSum(loss=math.nan, num_tokens=0, stop_requested=stop_requested),
        grad_norm=math.nan,
        learning_rate=_end_step(machine),
        outcome=Outcome.LEFT_OUT,
    )


def _end_step(machine: Machine) -> float:
    """Advance the schedule. Return the learning rate of the step that ends."""
    learning_rate = get_canonical_lr_for_logging(machine.optimizer.param_groups) or 0.0
    machine.scheduler.step(increment=1)
    return learning_rate


def run_microbatches(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Iterator[Batch]],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
) -> list[torch.Tensor]:
    """Run megatron.core's schedule. Return each micro-batch's [loss sum, tokens] on the last stage, else nothing."""
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=list(batches) if len(chunks) > 1 else batches[0],
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **communication(chunks, num_microbatches),
    )


def _forward_step(batches: Iterator[Batch], chunk: torch.nn.Module):
    batch = next(batches)
    device = torch.cuda.current_device()
    tokens, position_ids, labels, loss_mask = (
        batch[name].to(device, non_blocking=True) for name in ("tokens", "position_ids", "labels", "loss_mask")
    )
    token_weights = loss_mask
    if "known" in batch:
        token_weights = loss_mask * batch["known"].to(device, non_blocking=True)[:, None]
    output = chunk(tokens, position_ids, None, labels=labels, **penalty_arguments(chunk, token_weights))
    return output, partial(_sum_loss, loss_mask)


def _sum_loss(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Return the loss sum, the number of tokens, and both as one vector to report. Losses and mask are [b, s]."""
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    return total, num_tokens.to(torch.int), torch.stack([total.detach(), num_tokens]).double()


def reduce_loss(
    sums: Sequence[torch.Tensor],
    *,
    layout: ParallelLayout,
    penalties: Sequence[BlockPenalty] = (),
    stop_requested: bool = False,
) -> LossSum:
    """Return, on every rank, the loss and the penalty over all micro-batches and replicas, and whether any rank was
    asked to stop. `penalties` are those of this rank's chunks.

    This takes one all-reduce of four numbers. Tensor-parallel ranks hold the same loss, so only the first adds it. The
    same holds for the penalty without sequence parallelism.
    """
    vector = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    if sums and layout.tensor_rank == 0:
        vector[:2] = torch.stack(list(sums)).sum(dim=0)
    for penalty in penalties:
        if layout.tensor_rank == 0 or penalty.is_divided:
            vector[2] += penalty.total / penalty.num_blocks
    vector[3] = float(stop_requested)
    dist.all_reduce(vector)
    total, num_tokens, penalised, stops = vector.tolist()
    return LossSum(
        loss=total / num_tokens if num_tokens else math.nan,
        num_tokens=int(num_tokens),
        penalty=(penalised / num_tokens if num_tokens else math.nan) if penalties else None,
        stop_requested=stops > 0,
    )


def skip_record(result: StepResult, state: TrainingState) -> dict[str, object]:
    """Return the `skip` record of the latest step."""
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


def check_not_diverged(result: StepResult, state: TrainingState, *, max_skipped_steps: int) -> None:
    """Raise `DivergedError`, on all ranks, if too many steps in a row were skipped."""
    if result.outcome is not Outcome.SKIPPED or state.skipped_in_a_row < max_skipped_steps:
        return
    why = f"the loss is {result.loss.loss:.4g} and the gradient norm {result.grad_norm:.4g}"
    if not result.loss.num_tokens:
        why = "no token has a loss (check the data's loss_mask)"
    raise for_all_ranks(
        DivergedError(
            f"step {state.iteration}: {why}; steps in a row without an update: {state.skipped_in_a_row}, the limit "
            "of training.max_skipped_steps: lower optimizer.lr, or list the steps with bad data in "
            "training.skip_iterations; the last checkpoint is intact"
        )
    )
