"""Evaluates checkpoints side by side, and one checkpoint along its dial. All ranks of the started world call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

from megatron_llamapro.checkpoint.dial import Dial
from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.token_files import TokenFile
from megatron_llamapro.evaluation.job import EvaluationJob
from megatron_llamapro.evaluation.model import EvaluatedModel
from megatron_llamapro.runtime.distributed import ask_first_rank, for_all_ranks
from megatron_llamapro.training.evaluation import HeldOutLoss

OnResult = Callable[[dict[str, HeldOutLoss]], object]


def evaluate_each(
    checkpoints: Mapping[str, Checkpoint], job: EvaluationJob, token_files: Mapping[str, TokenFile]
) -> dict[str, dict[str, HeldOutLoss]]:
    """Return the losses of every checkpoint, by its label. One model is in memory at a time.

    Raises:
        LlamaProError: a file cannot be read; on all ranks.
    """
    found = {}
    for label, checkpoint in checkpoints.items():
        model = EvaluatedModel.load(checkpoint, job, token_files)
        with sample_bar(label, model, num_passes=1) as bar:
            found[label] = model.losses(bar.update)
        del model
    return found


def sweep(
    checkpoint: Checkpoint,
    job: EvaluationJob,
    token_files: Mapping[str, TokenFile],
    *,
    scales: Sequence[float],
    original: Checkpoint | None,
) -> Iterator[tuple[float, dict[str, HeldOutLoss]]]:
    """Yield the losses at every scale of the dial. The model is loaded once; each scale then reads only what the dial
    moves, exactly as an export at that scale would write it.

    `original` is the model before training; see `checkpoint.dial.dialed`.

    Raises:
        LlamaProError: there is nothing to dial, a file cannot be read, or a loss at scale 0 is not a number; on all
            ranks.
    """
    dial = ask_first_rank(lambda: Dial.of(checkpoint, original=original))
    model = EvaluatedModel.load(dial.at(scales[0]), job, token_files)
    with sample_bar("sweep", model, num_passes=len(scales)) as bar:
        for scale in scales:
            if scale != scales[0]:
                model.read_weights(dial.at(scale), only=dial.undialed_hashes)
            losses = model.losses(bar.update)
            if scale == 0:
                check_finite(losses)
            yield scale, losses


def check_finite(losses: Mapping[str, HeldOutLoss]) -> None:
    """Raise `DataError`, on all ranks, if nothing can be compared with one of these losses of the original."""
    for name, held in losses.items():
        if not math.isfinite(held.loss):
            why = f"the loss of the set {name} is {held.loss}" if held.num_tokens else f"no token of {name} has a loss"
            raise for_all_ranks(DataError(f"{why}: the original needs a number there, to compare with"))


def sample_bar(label: str, model: EvaluatedModel, *, num_passes: int) -> tqdm:
    """Return a bar in samples on standard error; on a terminal, and on the first rank only."""
    hidden = True if model.layout.rank else None
    return tqdm(desc=label, total=num_passes * model.num_samples, unit="sample", disable=hidden, leave=False)
