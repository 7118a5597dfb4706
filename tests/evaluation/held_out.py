"""The held-out set of these tests, as an evaluation's job and as plain tensors read from the file itself."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

from megatron_llamapro.evaluation.job import EvaluationJob

SEQ_LENGTH, NUM_SAMPLES = 16, 5


def job(prefix: Path, **settings: object) -> EvaluationJob:
    return EvaluationJob(sets={"b": str(prefix)}, seq_length=SEQ_LENGTH, num_samples=NUM_SAMPLES, **settings)


def samples(prefix: Path) -> torch.Tensor:
    """Return the evaluated samples [samples, SEQ_LENGTH + 1], read from the file itself: evenly spaced ones."""
    tokens = numpy.fromfile(f"{prefix}.bin", dtype=numpy.uint16).astype(numpy.int64)
    available = (len(tokens) - 1) // SEQ_LENGTH
    starts = [number * available // NUM_SAMPLES * SEQ_LENGTH for number in range(NUM_SAMPLES)]
    return torch.stack([torch.from_numpy(tokens[start : start + SEQ_LENGTH + 1]) for start in starts])
