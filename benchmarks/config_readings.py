"""Compares this project's reading of accepted configurations with that of other versions of transformers.

python benchmarks/config_readings.py [--cases 1000] [--seed 0] [--venvs DIR]

The cases are every combination of the fields of rotary embeddings in every family, compared by frequencies, and
`--cases` small models with up to six odd fields, compared by logits too. Each is read as it is (`source`) and as an
export spells it. Prints one line per version. Exits with 1 if a version reads an export as another model, or fails.
docs/other_tools.md has the results.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from config_cases import FAMILIES, drawn_config, rope_configs
from config_difference import OurReading
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.families.hf_config import spelled_for_all
from venvs import python_of

ROOT = Path(__file__).resolve().parents[1]
READER = ROOT / "benchmarks" / "transformers_reading.py"
OWN = "pinned"
"""The version in this project's own environment."""
VERSIONS = ("transformers-4.56", OWN, "transformers-5.24")


@dataclass(frozen=True)
class Outcome:
    """How many cases a version reads as this project does, fails on, and reads as another model."""

    alike: int
    fails: int
    other: int
    example: str
    """The first case that fails or is another model."""

    def __str__(self) -> str:
        return f"{self.alike:6} alike {self.fails:6} fails {self.other:6} other"


@dataclass(frozen=True)
class Case:
    """A configuration that this project accepts."""

    config: dict
    ours: OurReading
    with_logits: bool

    @property
    def exported(self) -> Case:
        """The configuration as an export spells it."""
        return replace(self, config=spelled_for_all(self.config))


def accepted_cases(number: int, seed: int) -> list[Case]:
    """Return the accepted ones of every combination of rotary fields in every family and `number` drawn models."""
    choose = random.Random(seed).choice
    configs = [(config, False) for family in FAMILIES for config in rope_configs(family)]
    configs += [(drawn_config(choose), True) for _ in range(number)]
    read = ((config, OurReading.of(config), with_logits) for config, with_logits in configs)
    cases = [Case(config, ours, with_logits) for config, ours, with_logits in read if ours is not None]
    print(f"{len(configs)} configurations, {len(configs) - len(cases)} of them refused by this project", flush=True)
    return cases


def outcome(python: Path, cases: list[Case]) -> Outcome:
    """Return how the transformers version of an interpreter reads the cases."""
    counts: Counter[str] = Counter()
    example = ""
    for case, theirs in zip(cases, _read(python, cases), strict=True):
        difference = case.ours.difference(theirs)
        counts["alike" if difference is None else "fails" if "error" in theirs else "other"] += 1
        if difference is not None and not example:
            example = f"{difference}: {json.dumps(case.config)}"
    return Outcome(counts["alike"], counts["fails"], counts["other"], example)


def _read(python: Path, cases: list[Case]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        given, read = Path(folder) / "cases.jsonl", Path(folder) / "readings.jsonl"
        with given.open("w") as lines:
            for case in cases:
                shapes = case.ours.shapes if case.with_logits else None
                print(json.dumps({"config": case.config, "shapes": shapes}), file=lines)
        subprocess.run([python, "-W", "ignore", READER, given, read], check=True, stderr=subprocess.DEVNULL)
        return [json.loads(line) for line in read.read_text().splitlines()]


def main() -> int:
    """Make the cases, and let every version read them."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="number of drawn models")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws other models")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS), help="versions to compare")
    parser.add_argument("--venvs", type=Path, default=ROOT / "runs" / "venvs", metavar="DIR", help="their environments")
    args = parser.parse_args()
    cases = accepted_cases(args.cases, args.seed)
    failed = False
    for version in args.versions:
        python = Path(sys.executable) if version == OWN else python_of(version, args.venvs)
        for name, given in (("source", cases), ("export", [case.exported for case in cases])):
            found = outcome(python, given)
            print(f"{version:18} {name}  {found}", flush=True)
            failed |= name == "export" and found.other + found.fails > 0
            if found.example:
                print(f"  {found.example}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    run_command(main)
