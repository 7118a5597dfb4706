"""Make the inputs of the smoke test: DIR/text.jsonl from Python's documentation, and DIR/llama, a tiny random LLaMA.

python examples/smoke/make_inputs.py --output_dir DIR
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from megatron_llamapro.config.command import CommandParser, run_command


def main() -> int:
    """Write the text and the model, without a tokenizer."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write into")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) for _, text in sorted(topics.items()))
    (args.output_dir / "text.jsonl").write_text("".join(line + "\n" for line in lines))

    from megatron_llamapro.testing.tiny_models import make_tiny_model

    folder = make_tiny_model(args.output_dir / "llama", vocab_size=512, with_tokenizer=False)
    print(f"{args.output_dir / 'text.jsonl'}: {len(topics)} documents; {folder}: 4 blocks of random weights")
    return 0


if __name__ == "__main__":
    run_command(main)
