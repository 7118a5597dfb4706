"""transformers: the export gives the original's logits, bit for bit, and decodes the same tokens with a cache."""

from __future__ import annotations

import torch
from folders import folders, proved
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Compare logits, and then greedy decoding."""
    args = folders(__doc__)
    tokens = AutoTokenizer.from_pretrained(args.expanded)("The quick brown fox", return_tensors="pt").input_ids
    original, expanded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (args.original, args.expanded)
    )
    with torch.no_grad():
        assert torch.equal(expanded(tokens).logits, original(tokens).logits)
    decoded = [
        model.generate(tokens, max_new_tokens=16, do_sample=False, use_cache=cached)
        for model, cached in ((original, True), (expanded, True), (expanded, False))
    ]
    assert all(torch.equal(decoded[0], other) for other in decoded[1:])
    proved("the original's logits, bit for bit; the original's tokens, decoded with a cache and without")


if __name__ == "__main__":
    main()
