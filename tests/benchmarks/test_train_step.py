"""The training-step benchmark on a tiny model: all variants do the same work. No test looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llamapro.testing.distributed import run_distributed

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_report_is_consistent(tmp_path: Path) -> None:
    ended = run("--tiny", "--work_dir", tmp_path / "work", "--json", tmp_path / "steps.json")
    assert ended.returncode == 0, ended.stderr
    measured = json.loads((tmp_path / "steps.json").read_text())
    steps, memory = measured["steps"], measured["memory"]
    assert list(steps) == ["ours", "ours_everything", "transformers", "floor"]
    assert all(len(found) == 2 and min(s["seconds"] for s in found) > 0 for found in steps.values())
    assert [s["loss"] for s in steps["ours"]] != [s["loss"] for s in steps["ours_everything"]]
    # Both hold the same weights, because this vocabulary needs no padding.
    assert memory["ours"]["weight_bytes"] == memory["transformers"]["weight_bytes"] > 0
    assert all(found["peak_bytes"] > 0 for found in memory.values())
    assert ended.stdout.count("\n| ") == 5 and "| 1.000 |" in ended.stdout
    assert list((tmp_path / "work").iterdir()) == []


class Products(TorchDispatchMode):
    """FLOP of matrix products, and the number of SDPA calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.attention: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif "scaled_dot_product" in name:
            self.attention[name] += 1
        return func(*args, **(kwargs or {}))


def count_worker(folder: Path) -> tuple[int, Counter, int, Counter]:
    sys.path.append(str(BENCHMARKS))
    from step_floor import Floor
    from step_models import MODELS, make_checkpoints
    from step_worker import ours

    model = MODELS["tiny"]
    make_checkpoints(folder, model)
    step, floor = ours(model, folder)[1](), Floor(model)
    with Products() as ran:
        step()
    with Products() as needed:
        floor.run()
    return ran.flops, ran.attention, needed.flops, needed.attention


def test_the_floor_does_the_same_work_as_our_step(tmp_path: Path) -> None:
    """Exactly the same products; their sum equals the cost model."""
    from megatron_llamapro.expansion.trainable_part import TrainablePart
    from megatron_llamapro.planning.flops import block_attention_flops, step_work
    from step_models import MODELS
    from step_table import model_shape

    [(ran, attention, needed, floor_attention)] = run_distributed(count_worker, 1, tmp_path / "models")
    assert attention == floor_attention and sum(attention.values()) > 0
    model = MODELS["tiny"]
    shape = model_shape(model)
    work = step_work(shape, seq_length=model.seq_length, trains=TrainablePart(frozenset(model.added_layers)))
    backward = shape.num_layers - min(model.added_layers)
    attention_flops = block_attention_flops(shape, model.seq_length) * (shape.num_layers + 2 * backward)
    tokens = model.batch_size * model.seq_length
    assert ran == needed == round((work.total - attention_flops) * tokens)


def test_usage_errors_are_one_line() -> None:
    ended = run("--rounds", 0)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: --rounds and --threads must be at least 1") and ended.stderr.count("\n") == 1
