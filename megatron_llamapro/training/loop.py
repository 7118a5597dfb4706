"""The training loop: steps, evaluations, checkpoints, and a clean stop on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from megatron_llamapro.checkpoint.formats.folders import what_is_kept
from megatron_llamapro.config.checks import is_left_out, left_out
from megatron_llamapro.config.errors import LlamaProError
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.data.sampling import train_batches
from megatron_llamapro.runtime.distributed import for_all_ranks, on_any_rank
from megatron_llamapro.runtime.stop import StopRequest
from megatron_llamapro.runtime.watchdog import Watchdog
from megatron_llamapro.training.checkpoints.saver import Saver
from megatron_llamapro.training.checkpoints.state import Outcome, TrainingState
from megatron_llamapro.training.diagnostics import BlockDiagnostics
from megatron_llamapro.training.evaluation import evaluate
from megatron_llamapro.training.metrics import MetricsWriter
from megatron_llamapro.training.report import peak_memory_gib, work_per_token
from megatron_llamapro.training.setup import Run
from megatron_llamapro.training.step import StepResult, check_not_diverged, leave_out_step, skip_record, train_step


def train(run: Run, writers: Sequence[MetricsWriter], stop: StopRequest, watchdog: Watchdog | None = None) -> None:
    """Train to the configured end, or until a stop is requested. All ranks call it. Only rank 0 has `writers`. A
    `watchdog` is told of every step.

    Raises:
        LlamaProError: too many steps in a row were skipped, no gradient arrives at all, or a checkpoint cannot be
            written.
    """
    saver = _saver(run) if run.config.checkpoint.save else None
    with contextlib.ExitStack() as ends:
        if watchdog:
            ends.callback(watchdog.stop)
        batches = [ends.enter_context(contextlib.closing(_batches(run))) for _ in run.machine.chunks]
        try:
            _loop(run, batches, writers, stop, saver, watchdog)
        except LlamaProError as error:
            if saver and error.on_all_ranks:  # otherwise the other ranks do not join in
                _write(writers, *saver.finish())
            raise


def _saver(run: Run) -> Saver:
    return Saver(
        run.machine,
        config=run.config,
        state=run.state,
        identity=run.identity,
        source=run.start.source,
        resume_from=run.resume_from,
    )


def _loop(
    run: Run,
    batches: Sequence,
    writers: Sequence[MetricsWriter],
    stop: StopRequest,
    saver: Saver | None,
    watchdog: Watchdog | None,
) -> None:
    config, state = run.config, run.state
    total = config.training.train_iters
    if state.iteration >= total:
        _say(run, f"nothing is left to do: step {state.iteration} of {total} is saved in {config.checkpoint.save}")
        return
    if state.iteration == 0:
        _evaluate(run, writers)
    diagnostics = _diagnostics(run)
    timer = StepTimer(run)
    unwatched = watchdog.paused if watchdog else contextlib.nullcontext

    def keep(*, finished: bool) -> None:
        """Save this step if it is not saved yet. With `finished`, also wait until it is on disk."""
        if not saver:
            return
        with unwatched():
            if state.iteration != saver.latest:
                _write(writers, *saver.save())
            _write(writers, *(saver.finish() if finished else []))
        timer.restart()

    stop.begin(saves=saver is not None)
    while state.iteration < total:
        if watchdog:
            watchdog.beat()
        watched = diagnostics if _watches(config, state.iteration + 1) else None
        result = _step(run, batches, stop, watched)
        _check_healthy(result, state)
        last = state.iteration == total
        if result.outcome is not Outcome.UPDATED:
            _write(writers, skip_record(result, state))
            check_not_diverged(result, state, max_skipped_steps=config.training.max_skipped_steps)
            if result.outcome is Outcome.LEFT_OUT:
                timer.leave_out()
        elif last or state.iteration % config.logging.log_interval == 0:
            _write(writers, timer.record(result))
        if watched is not None:
            for figures in watched.figures():
                _write(writers, {"kind": "block", "iteration": state.iteration, **figures})
            timer.restart()
        if saver:
            _write(writers, *saver.poll())
        stopping = result.loss.stop_requested or _exits(config.training.exit_interval, state.iteration)
        if stopping:  # save first: a scheduler does not wait for an evaluation
            keep(finished=True)
        if _due(config.training.eval_interval, state.iteration, last):
            with unwatched():
                _evaluate(run, writers)
            timer.restart()
            stopping = stopping or on_any_rank(stop.requested)
        if stopping or last or _due(config.checkpoint.save_interval, state.iteration):
            keep(finished=stopping or last)
            stopping = stopping or on_any_rank(stop.requested)
        if stopping and not last:
            keep(finished=True)
            _say(run, f"stopped after step {state.iteration} of {total}; {what_is_kept(config.checkpoint.save)}")
            return
    _say(run, f"finished {total} steps; " + _where_saved(run))


def _diagnostics(run: Run) -> BlockDiagnostics | None:
    if not run.config.logging.diagnostics_interval:
        return None
    return BlockDiagnostics(run.machine, plan=run.start.plan, base=run.start.source)


def _step(run: Run, batches: Sequence, stop: StopRequest, watched: BlockDiagnostics | None) -> StepResult:
    training = run.config.training
    if is_left_out(run.state.iteration + 1, training):
        result = leave_out_step(run.machine, stop_requested=on_any_rank(stop.requested))
    else:
        result = _run_step(run, batches, stop, watched)
    run.state.end_step(result.outcome, num_samples=training.global_batch_size)
    return result


def _run_step(run: Run, batches: Sequence, stop: StopRequest, watched: BlockDiagnostics | None) -> StepResult:
    with watched.watching() if watched else contextlib.nullcontext():
        return train_step(
            run.machine,
            batches,
            num_microbatches=run.num_microbatches,
            micro_batch_size=run.config.training.micro_batch_size,
            seq_length=run.config.data.seq_length,
            stop_requested=lambda: stop.requested,
            before_update=watched.note_gradients if watched else None,
        )


def _batches(run: Run):
    training = run.config.training
    return train_batches(
        run.train_set,
        num_samples=run.config.data_order_samples,
        consumed_samples=run.state.consumed_samples,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_parallel_rank=run.layout.data_rank,
        data_parallel_size=run.layout.data_size,
        iteration=run.state.iteration,
        left_out=left_out(training),
        num_workers=run.config.data.num_workers,
    )


def _check_healthy(result: StepResult, state: TrainingState) -> None:
    """Raise if no gradient arrives before the first update: the cause is in the configuration."""
    if result.grad_norm == 0.0 and state.num_updates == 0 and state.iteration > 1:
        raise for_all_ranks(
            LlamaProError(
                f"step {state.iteration}: the gradient norm is exactly 0, so nothing learns: check model.trainable "
                "and the data's loss_mask"
            )
        )


def _evaluate(run: Run, writers: Sequence[MetricsWriter]) -> None:
    losses = evaluate(
        run.machine.chunks,
        run.held_out,
        layout=run.layout,
        micro_batch_size=run.config.training.micro_batch_size,
        seq_length=run.config.data.seq_length,
    )
    for name, loss in losses.items():
        record = {"kind": "eval", "iteration": run.state.iteration, "name": name}
        figures = {"loss": loss.loss, "bits_per_byte": loss.bits_per_byte, "tokens": loss.num_tokens}
        _write(writers, {**record, **figures})


class StepTimer:
    """Timing of the steps since the last record."""

    def __init__(self, run: Run) -> None:
        self.run = run
        work = work_per_token(run.config, run.start.shape, run.start.plan)
        self.tflops = work.total / 1e12
        self.restart()

    def restart(self) -> None:
        """Start counting now. The time before this call was not spent on steps."""
        self.started, self.iteration = time.perf_counter(), self.run.state.iteration

    def leave_out(self) -> None:
        """Leave the latest step out of the count, because it took no time."""
        self.iteration += 1

    def record(self, result: StepResult) -> dict[str, object]:
        """Return the `train` record of the latest step, with speeds averaged since the last record."""
        run = self.run
        steps = run.state.iteration - self.iteration
        seconds = (time.perf_counter() - self.started) / max(steps, 1)
        tokens = run.config.training.global_batch_size * run.config.data.seq_length / seconds
        self.restart()
        return {
            "kind": "train",
            "iteration": run.state.iteration,
            "loss": result.loss.loss,
            **({} if result.loss.penalty is None else {"penalty": result.loss.penalty}),
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": tokens,
            "tflops_per_second": tokens * self.tflops / run.layout.world_size,
            "memory_gib": peak_memory_gib(),
            "step_seconds": seconds,
            "consumed_samples": run.state.consumed_samples,
        }


def _watches(config: RunConfig, iteration: int) -> bool:
    """Return whether the added blocks' diagnostics are due. A step that is left out has none."""
    return _due(config.logging.diagnostics_interval, iteration) and not is_left_out(iteration, config.training)


def _due(interval: int, iteration: int, last: bool = False) -> bool:
    return interval > 0 and (last or iteration % interval == 0)


def _exits(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0


def _write(writers: Sequence[MetricsWriter], *records: dict[str, object]) -> None:
    for record in records:
        for writer in writers:
            writer.write(record)


def _say(run: Run, text: str) -> None:
    if run.layout.rank == 0:
        print(text, flush=True)


def _where_saved(run: Run) -> str:
    save = run.config.checkpoint.save
    return f"checkpoint: {save}, step {run.state.iteration}" if save else what_is_kept(save)
