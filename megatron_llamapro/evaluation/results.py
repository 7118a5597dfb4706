"""The results of evaluations: JSON, tables, and what a new domain gains at no loss of the known ones. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.version import VERSION

if TYPE_CHECKING:
    from megatron_llamapro.checkpoint.formats.checkpoint import Checkpoint
    from megatron_llamapro.data.token_files import TokenFile
    from megatron_llamapro.evaluation.job import EvaluationJob

Losses = Mapping[str, float]
"""Loss in nats per token, by set."""
Figures = Mapping[str, Mapping[str, Any]]
"""Loss, perplexity, bits per byte, tokens and bytes of text, by set (`losses_json`)."""


class SetLoss(Protocol):
    """`training.evaluation.HeldOutLoss`, which needs torch to be imported."""

    loss: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float: ...

    @property
    def bits_per_byte(self) -> float: ...


def losses_json(losses: Mapping[str, SetLoss]) -> dict[str, dict[str, Any]]:
    """Return the figures of every set: nats per token, perplexity, bits per byte, tokens, bytes."""
    return {
        name: {
            "loss": held.loss,
            "perplexity": held.perplexity,
            "bits_per_byte": held.bits_per_byte,
            "tokens": held.num_tokens,
            "bytes": held.num_bytes,
        }
        for name, held in losses.items()
    }


def settings_json(job: EvaluationJob, token_files: Mapping[str, TokenFile]) -> dict[str, Any]:
    """Return what the losses depend on besides the checkpoint. Two results with equal settings can be compared."""
    return {
        "version": VERSION,
        "seq_length": job.seq_length,
        "num_samples": job.num_samples,
        "format": job.data_format,
        "sets": {name: {"prefix": prefix, "digest": token_files[prefix].digest} for name, prefix in job.sets.items()},
    }


def checkpoint_json(
    checkpoint: Checkpoint, job: EvaluationJob, label: str, losses: Mapping[str, SetLoss]
) -> dict[str, Any]:
    """Return what `llamapro evaluate` writes of one checkpoint."""
    return {
        "label": label,
        "folder": str(checkpoint.folder),
        "precision": job.precision_of(checkpoint),
        "losses": losses_json(losses),
    }


def read_reference(path: Path, settings: Mapping[str, Any], *, precision: str) -> Figures:
    """Return the figures of the only checkpoint in the JSON file of `llamapro evaluate`, for the sets of `settings`.

    Raises:
        ConfigError: the file has other content, or other settings: its losses could not be compared.
    """
    wrong = f"{path} cannot be the reference:"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entry, *others = content["checkpoints"]
        if others:
            raise ConfigError(f"{wrong} it has {1 + len(others)} checkpoints: evaluate the original alone")
        figures = {name: entry["losses"][name] for name in settings["sets"]}
        for name in ("seq_length", "num_samples", "format"):
            if content[name] != settings[name]:
                raise ConfigError(f"{wrong} its {name} is {content[name]}, but here it is {settings[name]}")
        if entry["precision"] != precision:
            raise ConfigError(f"{wrong} it was evaluated in {entry['precision']}, but here it is {precision}")
        for name, held in settings["sets"].items():
            if figures[name]["loss"] is None:
                raise ConfigError(f"{wrong} the loss of {name} in it is not a number")
            if content["sets"][name]["digest"] != held["digest"]:
                raise ConfigError(f"{wrong} its set {name} has other tokens: evaluate the original again")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{wrong} it must be written by llamapro evaluate --output, for the original and all these sets ({error})"
        ) from None
    return figures


def table(losses: Mapping[str, Mapping[str, SetLoss]]) -> str:
    """Return one row per set and checkpoint, given the losses by checkpoint and set. Changes are from the first one."""
    first = next(iter(losses.values()))
    rows = [("set", "checkpoint", "loss", "change", "perplexity", "bits/byte", "tokens")]
    for name in first:
        for label, held in losses.items():
            own = held[name]
            change = "" if held is first else f"{own.loss - first[name].loss:+.4f}"
            figures = (f"{own.loss:.4f}", change, f"{own.perplexity:.3f}", f"{own.bits_per_byte:.4f}")
            rows.append((name, label, *figures, f"{own.num_tokens:,}"))
    return aligned(rows, num_left=2)


def aligned(rows: Sequence[Sequence[str]], *, num_left: int) -> str:
    """Return the rows in columns of equal width, of which the first `num_left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        padded = [cell.ljust(width) if i < num_left else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, rows))


@dataclass(frozen=True)
class Choice:
    """The scale to choose, by a sweep."""

    scale: float
    gain: float
    """Decrease of the new domains' mean loss, in nats per token."""
    worst_known: float
    """Increase of the loss of the known set that got worse most; negative if all got better."""


@dataclass(frozen=True)
class Curve:
    """The losses along the dial."""

    losses: Mapping[float, Losses]
    """By scale. Scale 0, the original, is among them."""
    new: Sequence[str]
    """Names of the sets of new domains."""
    known: Sequence[str]

    @classmethod
    def of(cls, figures: Mapping[float, Figures], *, new: Sequence[str], known: Sequence[str]) -> Curve:
        """Return the curve of a sweep, given its figures by scale."""
        losses = {scale: {name: held["loss"] for name, held in sets.items()} for scale, sets in figures.items()}
        return cls(losses, new, known)

    def to_json(self, figures: Mapping[float, Figures], *, tolerance: float) -> dict[str, Any]:
        """Return the sets, the figures of every scale, and the choice."""
        return {
            "new": [*self.new],
            "known": [*self.known],
            "tolerance": tolerance,
            "scales": [{"scale": scale, "losses": figures[scale]} for scale in sorted(figures)],
            "choice": asdict(self.choice(tolerance)),
            "gain_at_no_loss": self.gain_at_no_loss(tolerance),
        }

    @property
    def _finite(self) -> list[float]:
        """The scales at which every loss is a number. A run that diverged may have none but 0."""
        return [scale for scale, losses in self.losses.items() if all(map(math.isfinite, losses.values()))]

    def gain(self, scale: float) -> float:
        """Return the decrease of the new domains' mean loss."""
        return sum(self.losses[0.0][name] - self.losses[scale][name] for name in self.new) / len(self.new)

    def worst_known(self, scale: float) -> float:
        """Return the largest increase of a known set's loss."""
        return max(self.losses[scale][name] - self.losses[0.0][name] for name in self.known)

    def choice(self, tolerance: float) -> Choice:
        """Return the measured scale with the most gain at which no known set is worse than the original by more than
        `tolerance`. The original is one of them."""
        allowed = [scale for scale in self._finite if self.worst_known(scale) <= tolerance]
        best = max(allowed, key=lambda scale: (self.gain(scale), -scale))
        return Choice(best, self.gain(best), self.worst_known(best))

    def gain_at_no_loss(self, tolerance: float) -> float:
        """Return the most gain at which no known set is worse by more than `tolerance`, with losses interpolated
        linearly between the measured scales. If losses are convex along the dial, this is slightly
        too low."""
        scales = sorted(self._finite)
        gains = [self.choice(tolerance).gain]
        for low, high in pairwise(scales):
            part = min((self._part_within(name, low, high, tolerance) for name in self.known), default=1.0)
            if part > 0:
                gains.append(self.gain(low) + part * (self.gain(high) - self.gain(low)))
        return max(gains)

    def _part_within(self, name: str, low: float, high: float, tolerance: float) -> float:
        """Return the part of the way from one scale to the next that a known set stays within the tolerance."""
        limit = self.losses[0.0][name] + tolerance
        at_low, at_high = self.losses[low][name], self.losses[high][name]
        if at_low > limit:
            return 0.0
        return 1.0 if at_high <= limit else (limit - at_low) / (at_high - at_low)

    def conclusion(self, tolerance: float) -> str:
        """Return the sentence that names the scale to choose, or says why there is none."""
        choice = self.choice(tolerance)
        what = f"the loss of {self.new[0]}" if len(self.new) == 1 else f"the mean loss of {', '.join(self.new)}"
        if choice.scale:
            lost = choice.worst_known
            kept = f"no known set is worse than the original{f' by more than {lost:.4f}' if lost > 0 else ''}"
            return (
                f"--added_block_scale {choice.scale:g} gains most within the tolerance: {what} falls by "
                f"{choice.gain:.4f}{self._exceptions(choice.scale)}, and {kept}"
            )
        gaining = [scale for scale in self._finite if self.gain(scale) > 0]
        if gaining:
            least = self.losses[min(gaining)]
            worst = max(self.known, key=lambda name: least[name] - self.losses[0.0][name])
            return f"every scale that lowers {what} makes {worst} worse by more than {tolerance:g}: try smaller scales"
        if len(self._finite) < len(self.losses):
            return "losses above scale 0 are not numbers: the run diverged, or its weights are damaged"
        return f"no scale lowers {what}: was this checkpoint trained, and are the sets of --new the right ones?"

    def _exceptions(self, scale: float) -> str:
        """Return which of several new sets are worse than the original, although their mean is better."""
        changes = {name: self.losses[scale][name] - self.losses[0.0][name] for name in self.new}
        worse = [f"{name} is worse by {change:.4f}" for name, change in changes.items() if change > 0]
        return f" (but {', '.join(worse)})" if worse else ""

    def table(self) -> str:
        """Return one row per scale: the loss of each set, and its change."""
        names = [*self.new, *self.known]
        rows = [("scale", *(cell for name in names for cell in (name, "change")))]
        for scale in sorted(self.losses):
            pairs = [(self.losses[scale][name], self.losses[scale][name] - self.losses[0.0][name]) for name in names]
            rows.append((f"{scale:g}", *(cell for loss, change in pairs for cell in (f"{loss:.4f}", f"{change:+.4f}"))))
        return aligned(rows, num_left=0)
