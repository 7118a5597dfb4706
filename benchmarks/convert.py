"""Measures the converter against a plain copy of the same bytes, and against other tools for the same work.

python benchmarks/convert.py --model tinyllama [--runs 3] [--peers all] [--work_dir DIR] [--json FILE]
python benchmarks/convert.py --tiny
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from conversion_table import Run, describe_machine, markdown
from measure import ProgramError, bytes_in, copy_command, forget_files, run_measured
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import ConfigError
from random_llama import SHAPES, LlamaShape, write_random_llama
from venvs import VENVS, python_of

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"
NUM_ADDED_BLOCKS = 8
_SLACK_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class Step:
    """One row of the table: a program, and the folder that it writes."""

    key: str
    title: str
    target: str
    command: tuple[str | Path, ...]
    is_peer: bool = False


def steps(work_dir: Path, *, peers: bool, venvs: Path) -> list[Step]:
    """Return the steps of a round, in order. A step's output stays until no later step reads it."""
    source, megatron = work_dir / "source", work_dir / "megatron"
    convert = (sys.executable, "-m", "megatron_llamapro", "convert")
    added = ("--num_added_blocks", str(NUM_ADDED_BLOCKS))

    def between(here: Path, there: str) -> tuple[str | Path, ...]:
        return ("--source", here, "--target", work_dir / there)

    found = [
        Step(
            "hf_to_megatron",
            f"this converter, Hugging Face → Megatron, {NUM_ADDED_BLOCKS} blocks added",
            "megatron",
            (*convert, "hf-to-megatron", *between(source, "megatron"), *added),
        ),
        Step("floor", "cp of that Megatron checkpoint: **the floor**", "copy", _copy(megatron, work_dir / "copy")),
        Step("copy_of_source", "cp of the source", "source_copy", _copy(source, work_dir / "source_copy")),
        Step(
            "megatron_to_hf",
            "this converter, Megatron → Hugging Face",
            "back",
            (*convert, "megatron-to-hf", *between(megatron, "back")),
        ),
    ]
    if not peers:
        return found
    bridge, whole = "megatron_bridge_import.py", "copy_blocks_in_memory.py"
    python = python_of("megatron-bridge", venvs)
    return [
        *found,
        Step(
            "megatron_bridge",
            "Megatron-Bridge, Hugging Face → Megatron, no blocks added",
            "bridge",
            ("env", f"PYTHONPATH={ROOT}", python, ROOT / "benchmarks" / "peers" / bridge, *between(source, "bridge")),
            is_peer=True,
        ),
        Step(
            "whole_model",
            f"the paper's method in transformers, Hugging Face → Hugging Face, {NUM_ADDED_BLOCKS} blocks added",
            "whole",
            (sys.executable, ROOT / "benchmarks" / "peers" / whole, *between(source, "whole"), *added),
            is_peer=True,
        ),
    ]


def _copy(source: Path, target: Path) -> tuple[str | Path, ...]:
    return tuple(copy_command(source, target))


def make_source(folder: Path, shape: LlamaShape) -> None:
    """Write the source checkpoint, unless an earlier run with --keep left one."""
    if folder.is_dir():
        return
    draft = folder.with_name(".source.partial")
    shutil.rmtree(draft, ignore_errors=True)
    write_random_llama(draft, shape)
    draft.rename(folder)


def measure_rounds(all_steps: list[Step], work_dir: Path, *, runs: int) -> dict[str, list[Run]]:
    """Run every step once per round, interleaved, so that a slow minute of the machine affects all of them.

    Raises:
        ConfigError: one of this project's own commands failed. A peer that fails is left out of later rounds.
    """
    measured: dict[str, list[Run]] = {step.key: [] for step in all_steps}
    failed: dict[str, Run] = {}
    for number in range(runs):
        for step in all_steps:
            if step.key in failed:
                continue
            print(f"round {number + 1} of {runs}: {step.title}", file=sys.stderr, flush=True)
            target = work_dir / step.target
            shutil.rmtree(target, ignore_errors=True)
            forget_files(work_dir)
            try:
                done = run_measured(step.command, written=work_dir, log=work_dir / f"{step.key}.log")
                measured[step.key].append(Run(**dataclasses.asdict(done), written_bytes=bytes_in(target)))
            except ProgramError as error:
                if not step.is_peer:
                    raise ConfigError(f"{step.title} failed, {error} ({work_dir / step.key}.log)") from None
                failed[step.key] = Run(failure=str(error))
                measured[step.key] = [failed[step.key]]
            if step.target != "megatron":
                shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(work_dir / "megatron")
    return measured


def check_room(work_dir: Path, shape: LlamaShape) -> None:
    """Check the free space on the disk.

    Raises:
        ConfigError: the source, the Megatron checkpoint and one more copy of it do not fit on the disk.
    """
    expanded = shape.with_layers(shape.num_hidden_layers + NUM_ADDED_BLOCKS)
    there = 0 if not (work_dir / "source").is_dir() else shape.num_bytes
    needed = shape.num_bytes - there + 2 * expanded.num_bytes + _SLACK_BYTES
    free = shutil.disk_usage(work_dir).free
    if free < needed:
        raise ConfigError(
            f"{work_dir} has {free / 1e9:.0f} GB free, but this model needs {needed / 1e9:.0f}: choose a smaller "
            "--model, or a --work_dir on another disk"
        )


def main() -> int:
    """Make the source, measure, print the table."""
    parser = CommandParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", choices=[name for name in SHAPES if name != "tiny"], default="tinyllama")
    what.add_argument("--tiny", action="store_true", help="quick check: a model of a few megabytes, one run, no peers")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds; the table shows medians (default: 3)")
    parser.add_argument("--peers", choices=("none", "all"), default="none", help="also measure others (default: none)")
    parser.add_argument("--work_dir", type=Path, default=RUNS / "benchmark", metavar="DIR", help="folder to write to")
    parser.add_argument("--venvs", type=Path, default=RUNS / "venvs", metavar="DIR", help="environments of peers")
    parser.add_argument("--keep", action="store_true", help="keep the source checkpoint for another measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run as JSON")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: it must be at least 1")
    name, runs, peers = ("tiny", 1, False) if args.tiny else (args.model, args.runs, args.peers == "all")
    shape = SHAPES[name]
    work_dir = args.work_dir / name
    work_dir.mkdir(parents=True, exist_ok=True)
    check_room(work_dir, shape)
    all_steps = steps(work_dir, peers=peers, venvs=args.venvs)
    make_source(work_dir / "source", shape)
    measured = measure_rounds(all_steps, work_dir, runs=runs)
    machine = describe_machine(work_dir, venv=VENVS["megatron-bridge"] if peers else None)
    expanded = shape.with_layers(shape.num_hidden_layers + NUM_ADDED_BLOCKS)
    print(markdown(name, shape, expanded, {step.title: measured[step.key] for step in all_steps}, machine))
    if args.json:
        content = {
            "model": name,
            "source_bytes": shape.num_bytes,
            "expanded_bytes": expanded.num_bytes,
            "machine": machine,
            "runs": {key: [dataclasses.asdict(run) for run in found] for key, found in measured.items()},
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(work_dir)
    return 0


if __name__ == "__main__":
    run_command(main)
