"""What the density of added blocks costs on LLaMA-2 7B: counted by the dry run, as evidence/costs.json.

python evidence/costs.py

The paper's recipe (examples/llama2_7b_pro/run.yaml) on 16 ranks. FLOPs and bytes are counted. Tokens per second follow
from the FLOPs at the planner's peak and efficiency, so only their ratios mean anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.files import write_json
from megatron_llamapro.planning.job import EFFICIENCY, PEAK_TFLOPS

RECIPE = "examples/llama2_7b_pro/run.yaml"
OUTPUT = Path("evidence/costs.json")
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
# What trains: options of the dry run, and a description. Two samples a micro-batch do not fit with all weights.
CASES = {
    "8 blocks (the paper's, after every fourth)": ["--num_added_blocks", "8"],
    "11 blocks (after every third)": ["--num_added_blocks", "11"],
    "16 blocks (after every second)": ["--num_added_blocks", "16"],
    "16 blocks, penalty": ["--num_added_blocks", "16", "--keep.penalty_weight", "10"],
    "32 blocks (after every block)": ["--num_added_blocks", "32"],
    "all weights": ["--model.trainable", "[everything]"],
}


def cost_of(options: list[str], folder: Path) -> dict[str, float]:
    """Return the figures of one rank, by dry run."""
    command = ["-m", "megatron_llamapro", "dry-run", "--config", RECIPE, "--hf_config", str(folder)]
    sizes = ["--world_size", "16", "--training.micro_batch_size", "1", "--keep.penalty_weight", "0", "--json"]
    done = subprocess.run([sys.executable, *command, *sizes, *options], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    [rank] = report["ranks"]
    flops = sum(rank["flops_per_token"].values())
    return {
        "trainable_parameters": report["trainable_parameters"],
        "gflop_per_token": flops / 1e9,
        "held_gib": sum(rank["held_bytes"].values()) / 2**30,
        "peak_gib": rank["peak_bytes"] / 2**30,
        "tokens_per_second_a_rank": PEAK_TFLOPS * 1e12 * EFFICIENCY / flops,
    }


def main() -> int:
    """Count every case."""
    CommandParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_2_7B))
        costs = {name: cost_of(options, Path(folder)) for name, options in CASES.items()}
    write_json(OUTPUT, costs)
    return 0


if __name__ == "__main__":
    run_command(main)
