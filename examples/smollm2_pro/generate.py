"""Continue two prompts with a Hugging Face checkpoint, greedily and with a KV cache.

python examples/smollm2_pro/generate.py --model HF_DIR --output FILE.json
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command

PROMPTS = {
    "cpp": "// Returns the sum of all elements.\ntemplate <typename T>\nT sum(const std::vector<T>& values) {\n",
    "english": "The Python language has several kinds of loops. The for statement",
}
NEW_TOKENS = 64


def main() -> int:
    """Write each prompt with its continuation."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="checkpoint to load")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file to write")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    samples = {}
    for name, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
        new = output[0, inputs.input_ids.shape[1] :]
        samples[name] = {"prompt": prompt, "continuation": tokenizer.decode(new, skip_special_tokens=True)}
    args.output.write_text(json.dumps(samples, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
