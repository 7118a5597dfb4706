"""Write the tables and pictures of docs/evidence.md from the committed results.

python evidence/report.py

A table stands between `<!-- table of QUESTION -->` and `<!-- end -->`, that of costs.json after `<!-- costs -->`. The
words around it are written by hand. A picture goes to docs/images/evidence_QUESTION.png.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cells import Cell, cells_of
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.evaluation.picture import draw_curves
from megatron_llamapro.evaluation.results import Curve
from outcomes import TOLERANCE, curve_of, read_results

RESULTS = Path("evidence/results")
PAGE = Path("docs/evidence.md")
IMAGES = Path("docs/images")
PICTURES = ("goal", "density")
"""The questions that get a picture."""
SEEDS = (1, 2, 3)

COSTS = Path("evidence/costs.json")

_COSTS = re.compile(r"(<!-- costs -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEADER = (
    "| new domain | trained | learning rate | gain | English | Python | gain at no loss | of plain blocks | seeds |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Finding:
    """The results of a run with one or several seeds."""

    cell: Cell
    """With seed 1, whichever seeds it had."""
    curves: Sequence[Curve]

    @property
    def mean_curve(self) -> Curve:
        """The losses averaged over the seeds, at each scale that all of them have."""
        first = self.curves[0]
        scales = set.intersection(*({*curve.losses} for curve in self.curves))
        losses = {
            scale: {name: statistics.mean(curve.losses[scale][name] for curve in self.curves) for name in of_scale}
            for scale, of_scale in first.losses.items()
            if scale in scales
        }
        return replace(first, losses=losses)

    @property
    def gains_at_no_loss(self) -> list[float]:
        return [curve.gain_at_no_loss(TOLERANCE) for curve in self.curves]

    def change(self, name: str) -> list[float]:
        """Return the change of a set's loss after training, for every seed."""
        return [curve.losses[1.0][name] - curve.losses[0.0][name] for curve in self.curves]


def figure(values: Iterable[float], sign: str = "") -> str:
    """Return the mean over the seeds, and their standard deviation if there are several."""
    values = list(values)
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def findings_of(cells: Sequence[Cell]) -> list[Finding]:
    """Return the finished runs, those that differ only in their seed together."""
    curves: dict[Cell, list[Curve]] = {}
    for cell, result in read_results(RESULTS, cells).items():
        curves.setdefault(replace(cell, seed=1), []).append(curve_of(result))
    return [Finding(cell, found) for cell, found in curves.items()]


def description(cell: Cell) -> str:
    """Return what was trained, as a reader says it."""
    parts = [_trained(cell)]
    if cell.trainable:
        parts.append(f"only {' and '.join(cell.trainable)}")
    if cell.init != "copy":
        parts.append(f"init {cell.init}")
    if cell.penalty_weight:
        parts.append(f"penalty {cell.penalty_weight:g}{' on known text' * (cell.penalty_on == 'known')}")
    if cell.replay:
        parts.append(f"replay {cell.replay:g}{' generated' * (cell.replay_from == 'generated')}")
    if cell.kl_weight:
        parts.append(f"distilled with weight {cell.kl_weight:g}")
    if cell.packs:
        parts.append("in a pack for each domain")
    if cell.steps != 50:
        parts.append(f"{cell.steps} steps")
    return ", ".join(parts)


def _trained(cell: Cell) -> str:
    if not cell.adds_blocks:
        return {"everything": "all weights", "lora": "low-rank adapters"}[cell.method]
    if cell.positions:
        return f"{len(cell.positions)} blocks at {', '.join(map(str, cell.positions))}"
    return f"{cell.num_added_blocks} blocks"


def plain_blocks(cell: Cell) -> Cell:
    """Return the run to compare with: six blocks without a penalty or replay, on the same domain, for as many steps."""
    return Cell(domain=cell.domain, lr=1e-3, steps=cell.steps)


def table(findings: Sequence[Finding], baselines: Mapping[Cell, Finding]) -> str:
    """Return a Markdown table, one row per run."""
    return _HEADER + "".join(_row(finding, baselines.get(plain_blocks(finding.cell))) for finding in findings)


def _row(finding: Finding, plain: Finding | None) -> str:
    cell = finding.cell
    gain = figure(curve.gain(1.0) for curve in finding.curves)
    at_no_loss = statistics.mean(finding.gains_at_no_loss)
    ratio = f"{at_no_loss / statistics.mean(plain.gains_at_no_loss):.2f} ×" if plain else ""
    columns = [
        cell.domain,
        description(cell),
        f"{cell.lr:g}",
        gain,
        *(figure(finding.change(name), "+") for name in finding.curves[0].known),
        figure(finding.gains_at_no_loss),
        ratio,
        str(len(finding.curves)),
    ]
    return f"| {' | '.join(columns)} |\n"


def page_with_tables(page: str) -> str:
    """Return the page with every table made anew."""

    def with_table(found: re.Match) -> str:
        cells = cells_of(found[2])
        findings = findings_of(cells)
        plain = dict.fromkeys(replace(plain_blocks(cell), seed=seed) for cell in cells for seed in SEEDS)
        baselines = {finding.cell: finding for finding in findings_of(list(plain))}
        return f"{found[1]}{table(findings, baselines)}{found[3]}"

    costs = json.loads(COSTS.read_text())
    return _COSTS.sub(lambda found: f"{found[1]}{costs_table(costs)}{found[2]}", _TABLE.sub(with_table, page))


def costs_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of what evidence/costs.py counted."""
    rows = [
        f"| {name} | {cost['trainable_parameters'] / 1e9:.2f} | {cost['gflop_per_token']:.1f} | {cost['held_gib']:.1f} "
        f"| {cost['peak_gib']:.1f} | {cost['tokens_per_second_a_rank']:,.0f} |\n"
        for name, cost in costs.items()
    ]
    header = (
        "| trained | trainable parameters, billion | GFLOP a token | held, GiB a rank | peak, GiB a rank "
        "| tokens/s a rank |\n|---|---|---|---|---|---|\n"
    )
    return header + "".join(rows)


def draw(question: str) -> None:
    """Draw a question's finished runs: a row of panels for each new domain."""
    rows: dict[str, dict[str, Curve]] = {}
    for finding in findings_of(cells_of(question)):
        row, label = rows.setdefault(finding.cell.domain, {}), description(finding.cell)
        if label in row:
            raise ValueError(f"{question}: two runs are described as {label}")
        row[label] = finding.mean_curve
    if rows:
        draw_curves(list(rows.values()), IMAGES / f"evidence_{question}.png", tolerance=TOLERANCE)


def main() -> int:
    """Write the page and the pictures."""
    CommandParser(description=__doc__).parse_args()
    write_atomically(PAGE, page_with_tables(PAGE.read_text(encoding="utf-8")))
    for question in PICTURES:
        draw(question)
    return 0


if __name__ == "__main__":
    run_command(main)
