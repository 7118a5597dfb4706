"""Run the experiments of a question, one after another. Finished ones are skipped, so the same command resumes.

python evidence/run.py --question goal

A run trains on the new domain, then sweeps the dial, and writes evidence/results/<name>.json. Everything else goes to
runs/evidence. A run of 50 steps takes about ten minutes on two cores.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from cells import KNOWN_SETS, NEW_DOMAINS, Cell, cells_of
from megatron_llamapro.checkpoint.formats.folders import iteration_of, latest_checkpoint
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.files import write_atomically, write_json
from outcomes import NUM_SAMPLES, SCALES, TOLERANCE, result_of

WORK = Path("runs/evidence")
RESULTS = Path("evidence/results")
ORIGINAL = RESULTS / "original.json"
EXAMPLE = Path("examples/smollm2_pro")
SEQ_LENGTH = 256
SAMPLES_PER_STEP = 4
NUM_RANKS = 2
WARMUP = 0.06
# The instruct model would begin with a conversation, not with a document.
GENERATED = ("--num_tokens", 60_000, "--eod_token", "<|endoftext|>")
# As many trainable parameters as six added blocks have.
LORA_RANK = 84


def prepare() -> None:
    """Make the model, the text and the token files, if they do not exist."""
    model = WORK / "smollm2"
    if not model.exists():
        run("python", EXAMPLE / "extract_model.py", "--target", model)
    domains = (*KNOWN_SETS, *NEW_DOMAINS)
    if not all((WORK / f"text/{domain}.train.jsonl").exists() for domain in domains):
        run("python", EXAMPLE / "build_text.py", "--output_dir", WORK / "text", "--domains", ",".join(domains))
    for domain in domains:
        for part in ("train", "held_out"):
            tokenise(f"{domain}.{part}")


def generate() -> None:
    """Make the text that the original model writes itself, if it does not exist."""
    text = WORK / "text/generated.train.jsonl"
    if not text.exists():
        model = WORK / "smollm2"
        run("llamapro", "generate-text", "--model", model, "--output", text, *GENERATED)
    tokenise("generated.train")


def tokenise(name: str) -> None:
    """Make a text's token files, if they do not exist."""
    prefix = WORK / "data" / name
    if not prefix.with_name(f"{name}.idx").exists():
        text = WORK / f"text/{name}.jsonl"
        run("llamapro", "preprocess", "--input", text, "--tokenizer", WORK / "smollm2", "--output_prefix", prefix)


def model_of(cell: Cell) -> Path:
    """Return the Megatron checkpoint that a run starts from; make it if it does not exist."""
    target = WORK / f"models/added-{cell.blocks}"
    if not target.exists():
        added = []
        if cell.adds_blocks:
            where = ("--positions", ",".join(map(str, cell.positions))) if cell.positions else ()
            added = [*(where or ("--num_added_blocks", cell.num_added_blocks)), "--init", cell.init]
        run("llamapro", "convert", "hf-to-megatron", "--source", WORK / "smollm2", "--target", target, *added)
    return target


def config_of(cell: Cell) -> dict:
    """Return the run's configuration."""
    config = {
        "model": {"checkpoint": str(model_of(cell)), "trainable": trainable(cell)},
        "data": {"train": sources(cell), "seq_length": SEQ_LENGTH, "cache_dir": str(WORK / "cache")},
        "training": {
            "train_iters": cell.steps,
            "micro_batch_size": SAMPLES_PER_STEP // NUM_RANKS,
            "global_batch_size": SAMPLES_PER_STEP,
            "precision": "fp32",
            "seed": cell.seed,
        },
        "optimizer": {"lr": cell.lr, "lr_decay_style": "cosine", "lr_warmup_fraction": WARMUP},
        "checkpoint": {"save": str(WORK / "work" / cell.name)},
    }
    if cell.method == "lora":
        config["lora"] = {"rank": LORA_RANK}
    if cell.kl_weight:  # samples are marked as known only for a penalty; this one is nothing
        config["keep"] = {"penalty_weight": 1e-20, "penalty_on": "known"}
    elif cell.penalty_weight:
        config["keep"] = {"penalty_weight": cell.penalty_weight, "penalty_on": cell.penalty_on}
    return config


def trainable(cell: Cell) -> list[str]:
    """Return `model.trainable`."""
    return list(cell.trainable) or [cell.method]


def sources(cell: Cell) -> list[dict]:
    """Return `data.train`: the new domain, and known text for the replayed share."""
    new = [{"prefix": str(WORK / f"data/{domain}.train"), "weight": 1 - cell.replay} for domain in cell.domains]
    if not cell.replay:
        return new
    names = KNOWN_SETS if cell.replay_from == "known" else ("generated",)
    share = cell.replay * len(cell.domains) / len(names)
    return [*new, *({"prefix": str(WORK / f"data/{name}.train"), "weight": share, "known": True} for name in names)]


def train(cell: Cell) -> None:
    """Train the run, if it is not trained yet. Of packs, train the run of each, and compose them."""
    folder = WORK / "work" / cell.name
    if cell.packs:
        compose(cell, folder)
        return
    if (folder / "trained").exists():
        return
    config = WORK / "work" / f"{cell.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config, yaml.safe_dump(config_of(cell), sort_keys=False))
    if cell.kl_weight:
        distil = ("evidence/distil.py", "--kl_weight", cell.kl_weight)
        run("torchrun", "--nproc-per-node", NUM_RANKS, *distil, "--config", config)
    else:
        torchrun("megatron_llamapro.pretrain", "--config", config)
    latest = latest_checkpoint(folder)
    if latest is None or iteration_of(latest) != cell.steps:
        raise SystemExit(f"{folder} was stopped before step {cell.steps}: the same command continues")
    (folder / "trained").touch()


def compose(cell: Cell, folder: Path) -> None:
    """Make the model of several packs, if it does not exist."""
    packs: list[object] = []
    for part in cell.parts:
        train(part)
        pack = WORK / "packs" / part.name
        if not pack.exists():
            run("llamapro", "extract", "--source", WORK / "work" / part.name, "--target", pack)
        packs += ["--pack", pack]
    if not folder.exists():
        run("llamapro", "compose", "--base", WORK / "smollm2", *packs, "--target", folder)


def evaluate_original() -> None:
    """Evaluate the original on every set, if it is not evaluated yet."""
    if not ORIGINAL.exists():
        model = WORK / "smollm2"
        sets = held_out((*KNOWN_SETS, *NEW_DOMAINS))
        torchrun("megatron_llamapro", "evaluate", "--checkpoint", model, "--set", *sets, *sizes(), "--output", ORIGINAL)


def sweep(cell: Cell) -> Path:
    """Evaluate a trained run along its dial. Return the file with the losses."""
    output = WORK / "work" / f"{cell.name}.sweep.json"
    original = () if cell.adds_blocks else ("--original", WORK / "smollm2")
    torchrun(
        *("megatron_llamapro", "sweep", "--checkpoint", WORK / "work" / cell.name, *original),
        *("--new", *held_out(cell.domains), "--known", *held_out(KNOWN_SETS)),
        *("--scales", ",".join(map(str, SCALES)), "--descend", "--tolerance", TOLERANCE),
        *("--reference", ORIGINAL, *sizes()),
        *("--output", output, "--overwrite"),
    )
    return output


def held_out(domains: Sequence[str]) -> list[str]:
    """Return the held-out sets of domains as options."""
    return [f"{domain}={WORK}/data/{domain}.held_out" for domain in domains]


def sizes() -> list[object]:
    """Return the options of an evaluation's size."""
    return ["--seq_length", SEQ_LENGTH, "--num_samples", NUM_SAMPLES, "--micro_batch_size", SAMPLES_PER_STEP]


def torchrun(module: str, *arguments: object) -> None:
    """Run a module of this project on two ranks."""
    run("torchrun", "--nproc-per-node", NUM_RANKS, "-m", module, *arguments)


def run(*command: object) -> None:
    """Print and run a command of this project. Its failure ends the program."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), flush=True)
    program = [str(Path(sys.executable).parent / words[0])] if words[0] != "python" else [sys.executable]
    subprocess.run([*program, *words[1:]], check=True)


def main() -> int:
    """Run a question's runs that have no result yet."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--question", required=True, metavar="NAME", help="a file of evidence/questions")
    args = parser.parse_args()
    prepare()
    evaluate_original()
    cells = cells_of(args.question)
    for number, cell in enumerate(cells, 1):
        result = RESULTS / f"{cell.name}.json"
        print(f"# run {number} of {len(cells)}: {cell.name}{' exists' * result.exists()}", flush=True)
        if not result.exists():
            if cell.replay_from == "generated":
                generate()
            train(cell)
            losses = result_of(cell, json.loads(sweep(cell).read_text()), json.loads(ORIGINAL.read_text()))
            write_json(result, losses)
            print(f"# gain {losses['gain']:.3f}, at no loss {losses['gain_at_no_loss']:.3f}", flush=True)
            if not cell.adds_blocks:  # its checkpoint is large, and no other question needs it
                shutil.rmtree(WORK / "work" / cell.name)
    return 0


if __name__ == "__main__":
    run_command(main)
