"""Report the demo's measurements: report.json, report.png and tables.

python examples/smollm2_pro/report.py --run_dir runs/smollm2_pro --steps 20
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.training.metrics_file import figure, read_records

METHODS = {"llamapro": "LLaMA Pro (added blocks)", "all_weights": "all weights"}
DOMAINS = {"cpp": "C++ (new)", "english": "English (known)", "python": "Python (known)"}
KNOWN = ("english", "python")
COLOURS = {"llamapro": "#0072B2", "all_weights": "#D55E00"}  # distinct for colour-blind readers
MARKS = {"llamapro": "o-", "all_weights": "s--"}


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a run."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: run examples/smollm2_pro/run.sh first")
    return read_records(path)


def curves(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, held-out loss) of each domain."""
    found: dict[str, list[tuple[int, float]]] = {domain: [] for domain in DOMAINS}
    for record in records:
        if record["kind"] == "eval":
            found[record["name"]].append((record["iteration"], figure(record, "loss")))
    return found


def figures(records: list[dict], sweep: dict) -> dict[str, object]:
    """Return the results of one method: of its run, and of its sweep along the dial."""
    run = next(record for record in records if record["kind"] == "run")
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
    lines = curves(records)
    return {
        "parameters": run["parameters"],
        "trainable_parameters": run["trainable_parameters"],
        "trainable_share": run["trainable_parameters"] / run["parameters"],
        "tokens_per_second_median": statistics.median(speeds),
        "held_out_loss": {domain: {"before": line[0][1], "after": line[-1][1]} for domain, line in lines.items()},
        "curves": lines,
        "dial": [
            {"scale": entry["scale"], **{domain: entry["losses"][domain]["loss"] for domain in DOMAINS}}
            for entry in sweep["scales"]
        ],
        "gain_at_no_loss": sweep["gain_at_no_loss"],
        "choice": sweep["choice"],
    }


def identity_error(run_dir: Path) -> float:
    """Return the largest logit difference between the original and the untrained expanded model, by transformers."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_llamapro.checkpoint.convert import megatron_to_hf

    original = run_dir / "smollm2"
    with tempfile.TemporaryDirectory(dir=run_dir) as folder:
        megatron_to_hf(run_dir / "megatron-45", Path(folder) / "expanded")
        ids = AutoTokenizer.from_pretrained(original)("The capital of France is Paris.", return_tensors="pt").input_ids
        logits = []
        for path in (original, Path(folder) / "expanded"):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            with torch.no_grad():
                logits.append(model(ids).logits)
    return (logits[0] - logits[1]).abs().max().item()


def draw(results: dict[str, dict], path: Path, *, steps: int) -> None:
    """Draw both methods: above, each domain's held-out loss over the steps; below, along the dial, C++ against each
    known domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axis, (domain, title) in zip(above.subplots(1, len(DOMAINS)), DOMAINS.items(), strict=True):
        for method, label in METHODS.items():
            points = results[method]["curves"][domain]
            axis.plot(*zip(*points, strict=True), MARKS[method], color=COLOURS[method], label=label, markersize=5)
        axis.axhline(results["llamapro"]["curves"][domain][0][1], color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="step")
        _tidy(axis)
    above.axes[0].set_ylabel("held-out loss, nats per token")
    above.axes[0].legend(frameon=False)
    for axis, known in zip(below.subplots(1, len(KNOWN), sharey=True), KNOWN, strict=True):
        for method in METHODS:
            _draw_dial(axis, results[method]["dial"], known, MARKS[method], COLOURS[method])
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xlabel=f"change of {DOMAINS[known]}, nats per token")
        _tidy(axis)
    below.axes[0].set_ylabel("gain in C++, nats per token")
    below.suptitle("along the dial, from the original (0) to what was trained (1)", fontsize="medium")
    figure.suptitle(f"SmolLM2-135M post-pretrained on C++ for {steps} steps of 1,024 tokens")
    figure.savefig(path, dpi=150)


def _draw_dial(axis, dial: list[dict], known: str, mark: str, colour: str) -> None:
    first = dial[0]
    changes = [point[known] - first[known] for point in dial]
    gains = [first["cpp"] - point["cpp"] for point in dial]
    axis.plot(changes, gains, mark, color=colour, markersize=5)
    for point, *place in zip(dial, changes, gains, strict=True):
        axis.annotate(f"{point['scale']:g}", place, textcoords="offset points", xytext=(6, -3), fontsize="x-small")


def _tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.92")


def show(report: dict) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="held-out loss, before → after")
    table.add_column("")
    for label in METHODS.values():
        table.add_column(label, justify="right")
    methods = report["methods"]
    for domain, title in DOMAINS.items():
        losses = [methods[method]["held_out_loss"][domain] for method in METHODS]
        table.add_row(title, *(f"{loss['before']:.3f} → {loss['after']:.3f}" for loss in losses))
    for name, key, form in (
        ("trainable parameters", "trainable_parameters", "{:,}"),
        ("trainable share", "trainable_share", "{:.1%}"),
        ("tokens/s, median", "tokens_per_second_median", "{:,.0f}"),
    ):
        table.add_row(name, *(form.format(methods[method][key]) for method in METHODS))
    table.add_row("C++ gained at no loss", *(f"{methods[method]['gain_at_no_loss']:.3f}" for method in METHODS))
    table.add_row("scale of the dial to choose", *(f"{methods[method]['choice']['scale']:g}" for method in METHODS))
    console.print(table)
    print(f"identity error before training (largest difference of a logit): {report['identity_error']}")
    print("original weights after training:")
    print("\n".join(f"  {line}" for line in report["verify"]))
    for name, sample in report["samples"].items():
        console.rule(name)
        console.print(sample["prompt"], style="dim", end="", markup=False, highlight=False)
        for model in ("before", "after"):
            console.print(f"\n[{model}] ", style="bold", end="", markup=False)
            console.print(sample[model], markup=False, highlight=False)


def main() -> int:
    """Read the run's results, measure the identity error, then write and print the report."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, metavar="DIR", help="the demo's folder")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="length of the run to report")
    args = parser.parse_args()
    out = args.run_dir / f"{args.steps}-steps"
    results = {
        method: figures(
            read_metrics(out / method / "metrics.jsonl"), json.loads((out / f"{method}.sweep.json").read_text())
        )
        for method in METHODS
    }
    before, after = (json.loads((out / f"{name}.sample.json").read_text()) for name in ("smollm2", "llamapro"))
    report = {
        "steps": args.steps,
        "identity_error": identity_error(args.run_dir),
        "verify": (out / "verify.txt").read_text().splitlines(),
        "methods": results,
        "samples": {
            name: {
                "prompt": sample["prompt"],
                "before": sample["continuation"],
                "after": after[name]["continuation"],
            }
            for name, sample in before.items()
        },
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(results, out / "report.png", steps=args.steps)
    show(report)
    print(f"\n{out / 'report.json'}, {out / 'report.png'}")
    return 0


if __name__ == "__main__":
    run_command(main)
