"""A conversion's output on a terminal: a progress bar in bytes, then a summary of a few lines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_llamapro.config.values import decimal_size
from megatron_llamapro.expansion.dial_record import DialRecord
from megatron_llamapro.expansion.plan import ExpansionPlan


class ByteBar:
    """A progress bar that learns its total when the work starts. Any thread may report progress."""

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._lock = bar, threading.Lock()

    def on_total(self, num_bytes: int) -> None:
        """Set the number of bytes to process."""
        self._bar.reset(total=num_bytes)

    def progress(self, num_bytes: int) -> None:
        """Add the number of bytes that were just processed."""
        with self._lock:
            self._bar.update(num_bytes)

    def write(self, line: str) -> None:
        """Print a line to standard output, above the bar."""
        self._bar.write(line)


@contextmanager
def byte_bar(description: str) -> Iterator[ByteBar]:
    """Show a bar on standard error, with the rate and the remaining time. It is shown on a terminal only."""
    with tqdm(desc=description, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield ByteBar(bar)


def summary(conversion: Conversion) -> str:
    """Return the summary: layers before and after, blocks added now and earlier, bytes and speed."""
    plan = conversion.plan
    lines = [f"{conversion.target}: {layers_text(conversion.num_source_layers, plan.num_layers)}"]
    rounds = range(plan.num_rounds + 1)
    before = next(n for n in rounds if len(plan.layers_after(n)) >= conversion.num_source_layers)
    added = tuple(i for i, layer in enumerate(plan.layers) if layer.added_in_round > before)
    for text, layers in (("added blocks", added), ("added earlier", sorted({*plan.added_layers} - {*added}))):
        if layers:
            lines.append(f"{text}: {', '.join(map(str, layers))}")
    seconds = max(conversion.seconds, 1e-9)
    lines.append(
        f"{decimal_size(conversion.num_bytes)} of {conversion.dtype} weights in {conversion.seconds:.1f} s "
        f"({decimal_size(conversion.num_bytes / seconds)}/s), read back and compared"
    )
    if conversion.num_merged:
        lines.append(f"{conversion.num_merged} low-rank adapters were merged into their weights")
    if conversion.dial:
        lines.append(
            f"dialed {conversion.dial}: {len(conversion.dial.undialed_hashes)} tensors, as llamapro.json records "
            "(llamapro verify --undialed proves it)"
        )
    if conversion.left_out_code:
        lines.append("auto_map in config.json names the model's own code, which is left out (docs/converter.md)")
    if conversion.left_out_notices:
        names = ", ".join(conversion.left_out_notices)
        lines.append(f"left out, as links to another folder or to nothing: {names}; add these texts by hand")
    if conversion.is_foreign:
        lines.append("the source has no llamapro.json: it is treated as a model that was never expanded")
    if conversion.num_resumed_bytes:
        lines.append(f"{decimal_size(conversion.num_resumed_bytes)} of them were already written by an earlier run")
    return "\n".join(lines)


def layers_text(before: int, after: int) -> str:
    """Return a text such as 30 → 36 layers."""
    return f"{after} layers" if before == after else f"{before} → {after} layers"


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    target: Path
    plan: ExpansionPlan
    num_source_layers: int
    dtype: str
    num_bytes: int
    num_resumed_bytes: int
    """Those that an earlier run had already written."""
    is_foreign: bool
    """Whether the source was a Megatron checkpoint without our manifest, treated as a model never expanded."""
    seconds: float
    num_merged: int = 0
    """The number of adapters that were merged into their weights."""
    dial: DialRecord | None = None
    """How the weights were dialed on the way; None if they were not."""
    left_out_code: bool = False
    """Whether config.json named the model's own code, which `without_code` left out."""
    left_out_notices: tuple[str, ...] = ()
    """The names that `side_files.notices_left_out` returned."""
