"""Measures time and memory of one optimizer step: this project's, transformers', and the floor of both.

python benchmarks/train_step.py --model small|smollm2 [--rounds 15] [--json FILE] [--work_dir DIR]
python benchmarks/train_step.py --tiny
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion_table import describe_machine
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError
from step_models import MODELS, StepModel, make_checkpoints
from step_table import Row, markdown

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = {
    "ours": "this project, added blocks train",
    "ours_everything": "this project, everything trains",
    "transformers": "transformers, added blocks train",
    "floor": "**the floor**: the matrix products and SDPA calls of the first row, nothing else",
}
_WARM_UP_STEPS = 3
# glibc returns every tensor above this size as soon as it is freed, so that the process holds only live tensors.
_EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Worker:
    """One candidate in its own process. On request it takes a step or measures its memory."""

    def __init__(self, candidate: str, model: str, folder: Path, *, threads: int, exact_memory: bool = False) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        environment |= _EXACT_MEMORY if exact_memory else {}
        self._candidate = candidate
        self._log = folder / f"{candidate}.log"
        command = [sys.executable, str(ROOT / "benchmarks" / "step_worker.py"), candidate, model, str(folder)]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )

    def ask(self, what: str) -> dict:
        """Send a request and return the answer.

        Raises:
            ConfigError: the candidate's process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ConfigError(f"{self._candidate} ended early: {self._log} says why")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def measure_memory(model: str, folder: Path, *, threads: int) -> dict[str, dict]:
    """Measure every candidate's peak over its first steps, one after the other, each in a fresh process."""
    measured = {}
    for candidate in (name for name in CANDIDATES if name != "floor"):
        worker = Worker(candidate, model, folder, threads=threads, exact_memory=True)
        measured[candidate] = worker.ask("memory")
        worker.close()
    return measured


def measure_time(model: str, folder: Path, *, rounds: int, threads: int) -> dict[str, list[dict]]:
    """Time one step of every candidate per round, in turns, so that a slow moment of the machine affects all of them.

    Only one candidate runs at a time. The others wait on their pipes.
    """
    workers = {candidate: Worker(candidate, model, folder, threads=threads) for candidate in CANDIDATES}
    for worker in workers.values():
        for _ in range(_WARM_UP_STEPS):
            worker.ask("step")
    steps: dict[str, list[dict]] = {candidate: [] for candidate in CANDIDATES}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for candidate, worker in workers.items():
            steps[candidate].append(worker.ask("step"))
    for worker in workers.values():
        worker.close()
    return steps


def check_same_losses(steps: dict[str, Sequence[dict]]) -> None:
    """Check that our losses and transformers' agree: both take the same steps on the same weights and tokens.

    The tolerance is 1e-3 relative, for float32 sums in another order after a few dozen optimizer steps.
    """
    for ours, theirs in zip(steps["ours"], steps["transformers"], strict=True):
        if abs(ours["loss"] - theirs["loss"]) > 1e-3 * theirs["loss"]:
            raise ConfigError(f"the computations differ: loss {ours['loss']} here, {theirs['loss']} in transformers")


def main() -> int:
    """Make the checkpoints, measure, print the table."""
    parser = CommandParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], default="small")
    what.add_argument("--tiny", action="store_true", help="quick check: a model of a megabyte, two rounds")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="the table shows medians (default: 15)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each candidate (default: 2)")
    parser.add_argument(
        "--clock",
        choices=("seconds", "cpu_seconds"),
        default="seconds",
        help="use cpu_seconds and --threads 1 on a machine that others use too (default: seconds)",
    )
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "train_step", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every step as JSON")
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    name, rounds = ("tiny", 2) if args.tiny else (args.model, args.rounds)
    model: StepModel = MODELS[name]
    folder = args.work_dir / name
    make_checkpoints(folder, model)
    memory = measure_memory(name, folder, threads=args.threads)
    steps = measure_time(name, folder, rounds=rounds, threads=args.threads)
    check_same_losses(steps)
    rows = {
        candidate: Row(title, [step[args.clock] for step in steps[candidate]], **memory.get(candidate, {}))
        for candidate, title in CANDIDATES.items()
    }
    machine = describe_machine(folder, venv=None)
    machine = {
        "threads": f"{args.threads}, {args.clock}",
        **{key: machine[key] for key in ("machine", "versions", "date")},
    }
    print(markdown(model, rows, machine))
    if args.json:
        content = {"model": dataclasses.asdict(model), "machine": machine, "steps": steps, "memory": memory}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    run_command(main)
