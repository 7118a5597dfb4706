"""The runs of a question: what one run is, its name, and the runs that a question's YAML file asks for. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = Path(__file__).parent / "questions"
NEW_DOMAINS = ("bytecode", "cpp", "german")
KNOWN_SETS = ("english", "python")
METHODS = ("added_blocks", "everything", "lora")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run. Runs with equal fields are one run, whichever question asks for them."""

    domain: str
    """The new domain, or several, joined by +: their documents mixed evenly."""
    method: str = "added_blocks"
    lr: float
    num_added_blocks: int = 6
    positions: tuple[int, ...] | None = None
    """Where the blocks go, instead of spread evenly."""
    init: str = "copy"
    trainable: tuple[str, ...] = ()
    """Single projections of the added blocks to train, instead of the whole blocks."""
    steps: int = 50
    penalty_weight: float = 0.0
    penalty_on: str = "all"
    replay: float = 0.0
    """Share of the samples from known text."""
    replay_from: str = "known"
    """known: the training documents of the known sets. generated: documents that the original model wrote."""
    kl_weight: float = 0.0
    """Weight of the distillation from the original on the replayed samples, instead of their cross-entropy."""
    packs: bool = False
    """One run per domain, and their packs composed, instead of one run on the mixed documents."""
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = {*self.domains} - {*NEW_DOMAINS}
        if unknown or self.method not in METHODS:
            raise ValueError(f"{self}: {unknown or self.method} is unknown")

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.domain.split("+"))

    @property
    def adds_blocks(self) -> bool:
        return self.method == "added_blocks"

    @property
    def parts(self) -> tuple[Cell, ...]:
        """The runs whose packs are composed."""
        return tuple(replace(self, domain=domain, packs=False) for domain in self.domains)

    @property
    def blocks(self) -> str:
        """The expanded model: a number of blocks, or their positions, and how they start."""
        if not self.adds_blocks:
            return "0"
        where = "_".join(map(str, self.positions)) if self.positions else str(self.num_added_blocks)
        return where if self.init == "copy" else f"{where}-{self.init}"

    @property
    def name(self) -> str:
        """The name of its result: its fields that are not the defaults."""
        parts = [self.domain, f"{self.method}_{self.blocks}" if self.adds_blocks else self.method]
        parts += [f"lr{self.lr:g}"]
        parts += self.trainable
        if self.penalty_weight:
            parts.append(f"penalty{self.penalty_weight:g}" + ("_known" if self.penalty_on == "known" else ""))
        if self.replay:
            parts.append(f"replay{self.replay:g}" + ("_generated" if self.replay_from == "generated" else ""))
        if self.kl_weight:
            parts.append(f"kl{self.kl_weight:g}")
        if self.packs:
            parts.append("packs")
        return "-".join([*parts, f"{self.steps}steps", f"seed{self.seed}"])

    def to_json(self) -> dict[str, Any]:
        """Return its fields that are not the defaults."""
        given = asdict(self)
        return {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}


def cells_of(question: str) -> list[Cell]:
    """Return a question's runs, in the order of its file, each once."""
    content = yaml.safe_load((QUESTIONS / f"{question}.yaml").read_text())
    found = (cell for entry in content["runs"] for cell in _expanded(entry))
    return list(dict.fromkeys(found))


def _expanded(entry: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield a run for every combination of the values of an entry's fields. A field's list holds several values."""
    options = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
    for values in itertools.product(*options.values()):
        yield Cell(**{key: _value(key, value) for key, value in zip(options, values, strict=True)})


def _value(key: str, value: object) -> Any:
    """Read `4,9,14` as positions and `linear_proj,linear_fc2` as parts to train."""
    if key == "positions":
        return tuple(int(part) for part in str(value).split(","))
    if key == "trainable":
        return tuple(str(value).split(","))
    return float(value) if key in ("lr", "penalty_weight", "replay", "kl_weight") else value
