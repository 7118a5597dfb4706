"""Every example's configuration runs dry at its world size: it starts, fits, and does the predicted work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import programs

ROOT = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
SMOLLM2_135M = {
    **LLAMA,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_2_7B = {
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


TINY = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def readme_yaml(folder: Path) -> Path:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "readme.yaml").write_text(text)
    return folder / "readme.yaml"


# Configuration, model, added blocks, ranks, memory per rank in GiB.
EXAMPLES = {
    "the README's": (readme_yaml, LLAMA_2_7B, 8, 16, 80),
    "smoke": (lambda _: ROOT / "examples/smoke/run.yaml", TINY, 2, 2, 1),
    "demo": (lambda _: ROOT / "examples/smollm2_pro/llamapro.yaml", SMOLLM2_135M, 15, 2, 8),
    "demo, all weights": (lambda _: ROOT / "examples/smollm2_pro/all_weights.yaml", SMOLLM2_135M, 0, 2, 8),
}


def test_every_example_is_covered() -> None:
    """Tests of benchmarks/baselines.py and recipes.py run the others; the files of slurm/ are not runs."""
    named = {make(Path()) for name, (make, *_) in EXAMPLES.items() if name != "the README's"}
    elsewhere = {
        path for glob in ("baselines/*", "*_pro*/run", "slurm/*") for path in ROOT.glob(f"examples/{glob}.yaml")
    }
    assert named == {*ROOT.glob("examples/**/*.yaml")} - elsewhere


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_fits_and_does_the_predicted_work(example: str, tmp_path: Path) -> None:
    make, hf_config, num_added, world_size, memory_gib = EXAMPLES[example]
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    added = ["--num_added_blocks", str(num_added)] if num_added else []
    job = ["--config", make(tmp_path), "--world_size", world_size, "--memory_gib", memory_gib]
    result = programs.run("tools/dry_run.py", *job, "--hf_config", tmp_path, "--json", *added, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    executed = sum(sum(rank["flops_per_token"].values()) for rank in found["ranks"])
    assert executed == pytest.approx(found["arithmetic_flops_per_token"], rel=1e-6)
