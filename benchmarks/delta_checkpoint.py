"""Measures seconds, stall and bytes of a run's checkpoints: full, delta, and delta written asynchronously.

python benchmarks/delta_checkpoint.py [--model small|smollm2|tiny] [--saves 5] [--work_dir DIR] [--json FILE]

The program trains the same few steps three times, on one process, and saves after each step. Its own records are read.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from conversion_table import describe_machine
from megatron_llamapro.config.command import CommandParser, run_command
from step_models import MODELS, make_checkpoints

WAYS = {
    "full": ("full checkpoint", ["--checkpoint.delta", "false"]),
    "delta": ("delta checkpoint", []),
    "async": ("delta checkpoint, asynchronous", ["--checkpoint.async_save", "true"]),
}


def main() -> int:
    """Train three times, and print the table."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--saves", type=int, default=5, metavar="N", help="saves per run (default: 5)")
    parser.add_argument("--work_dir", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every save's record")
    args = parser.parse_args()
    from megatron_llamapro.runtime.upstream import import_megatron

    import_megatron()
    found = {}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work_dir:
        folder = Path(work_dir)
        make_checkpoints(folder / "model", MODELS[args.model])
        prefix = _tokens(folder)
        for name, (_, options) in WAYS.items():
            found[name] = _saves(folder, prefix, name, options, num_saves=args.saves)
    print("| | bytes, MB | of full | stall, s | of full | in all, s |\n|---|---|---|---|---|---|")
    for name, (title, _) in WAYS.items():
        print(_row(title, found[name], found["full"]))
    machine = describe_machine(Path.cwd(), venv=None)
    print("\n" + "\n".join(f"- {what}: {machine[what]}" for what in ("machine", "versions", "date")))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    return 0


def _tokens(folder: Path) -> Path:
    """Write token files with one byte per token, and return their prefix."""
    from megatron_llamapro.data.preprocess import preprocess
    from megatron_llamapro.testing.tiny_models import write_tiny_tokenizer

    write_tiny_tokenizer(folder / "model" / "megatron")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    preprocess([folder / "text.jsonl"], folder / "text", tokenizer=folder / "model" / "megatron")
    return folder / "text"


def _saves(folder: Path, prefix: Path, name: str, options: list[str], *, num_saves: int) -> list[dict]:
    """Return the `save` records of a run without the first, which also writes the parts that later ones share."""
    run = folder / name
    settings = {
        "model.checkpoint": folder / "model" / "megatron",
        "data.train": f"[{{prefix: {prefix}}}]",
        "data.seq_length": 32,
        "training.train_iters": num_saves + 1,
        "training.micro_batch_size": 1,
        "training.global_batch_size": 1,
        "training.precision": "fp32",
        "checkpoint.save": run,
        "checkpoint.save_interval": 1,
        "checkpoint.keep_last": 1,
    }
    command = [sys.executable, "-m", "megatron_llamapro.pretrain"]
    command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    return [record for record in records if record["kind"] == "save"][1:]


def _row(title: str, records: list[dict], full: list[dict]) -> str:
    def median(of: list[dict], name: str) -> float:
        return statistics.median(record[name] for record in of)

    size, stall = median(records, "num_bytes"), median(records, "stall_seconds")
    return (
        f"| {title} | {size / 1e6:.1f} | {size / median(full, 'num_bytes'):.2f} | {stall:.2f} | "
        f"{stall / median(full, 'stall_seconds'):.2f} | {median(records, 'seconds'):.2f} |"
    )


if __name__ == "__main__":
    run_command(main)
