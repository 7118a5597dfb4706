"""docs/evidence.md shows the committed results, and each of them is a run that a question asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cells
import report
from outcomes import result_of

RESULTS = sorted(path for path in report.RESULTS.glob("*.json") if path.name != "original.json")
QUESTIONS = sorted(path.stem for path in cells.QUESTIONS.glob("*.yaml"))


def test_the_page_shows_the_results() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.page_with_tables(page) == page, "run: python evidence/report.py"


def test_every_question_has_a_table() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert sorted(found[2] for found in report._TABLE.finditer(page)) == QUESTIONS


def test_names_are_those_of_their_runs() -> None:
    asked = {cell.name: cell for question in QUESTIONS for cell in cells.cells_of(question)}
    names = [cell.name for question in QUESTIONS for cell in dict.fromkeys(cells.cells_of(question))]
    assert len({*names}) == len(asked) == len({*asked.values()})
    for path in RESULTS:
        assert json.loads(path.read_text())["cell"] == json.loads(json.dumps(asked[path.stem].to_json()))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_summaries_follow_from_the_losses(path: Path) -> None:
    """By hand: the gain, the worst known set, and a gain at no loss that no measured scale beats."""
    result = json.loads(path.read_text())
    losses = {float(scale): of_scale for scale, of_scale in result["losses"].items()}
    new = result["cell"]["domain"].split("+")
    gains = {scale: sum(losses[0.0][name] - held[name] for name in new) / len(new) for scale, held in losses.items()}
    worst = {
        scale: max(held[name] - losses[0.0][name] for name in ("english", "python")) for scale, held in losses.items()
    }
    assert result["gain"] == pytest.approx(gains[1.0])
    assert result["worst_known"] == pytest.approx(worst[1.0])
    allowed = [gains[scale] for scale in gains if worst[scale] <= 0.01]
    assert max(allowed) <= result["gain_at_no_loss"] + 1e-9 <= max(gains.values()) + 2e-9


def test_a_question_asks_for_every_combination() -> None:
    [first, *others] = [cell for cell in cells.cells_of("keeps") if cell.method == "lora" and not cell.replay]
    assert (first.domain, first.lr, first.name) == ("bytecode", 2.5e-4, "bytecode-lora-lr0.00025-50steps-seed1")
    assert len(others) == 5


def test_seeds_are_averaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = cells.Cell(domain="cpp", lr=1e-3)
    for seed, loss in ((1, 1.4), (2, 1.6)):
        cell = cells.Cell(domain="cpp", lr=1e-3, seed=seed)
        at_one = {name: {"loss": value} for name, value in {"cpp": loss, "english": 3.0, "python": 2.5}.items()}
        before = {name: {"loss": value} for name, value in {"cpp": 2.0, "english": 3.0, "python": 2.5}.items()}
        measured = [{"scale": scale, "losses": at_one} for scale in (0.75, 1.0)[-seed:]]  # --descend stops anywhere
        result = result_of(cell, {"scales": measured}, {"checkpoints": [{"losses": before}]})
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "cells_of", lambda question: [run, cells.Cell(domain="cpp", lr=1e-3, seed=2)])
    row = report.page_with_tables("<!-- table of goal -->\n<!-- end -->").splitlines()[3]
    assert row == (
        "| cpp | 6 blocks | 0.001 | 0.500 ± 0.141 | +0.000 ± 0.000 | +0.000 ± 0.000 | 0.500 ± 0.141 | 1.00 × | 2 |"
    )
    [finding] = report.findings_of([run, cells.Cell(domain="cpp", lr=1e-3, seed=2)])
    assert finding.mean_curve.losses[1.0]["cpp"] == pytest.approx(1.5) and [*finding.mean_curve.losses] == [0.0, 1.0]
