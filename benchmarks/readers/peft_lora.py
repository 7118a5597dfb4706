"""PEFT: LoRA on every block of the export. Before training the outputs equal the original's, and a few steps learn."""

from __future__ import annotations

import torch
from folders import folders, proved
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Add LoRA, compare with the original, and run a few steps."""
    args = folders(__doc__)
    tokens = AutoTokenizer.from_pretrained(args.expanded)("The quick brown fox", return_tensors="pt").input_ids
    original = AutoModelForCausalLM.from_pretrained(args.original, dtype=torch.float32)
    expanded = AutoModelForCausalLM.from_pretrained(args.expanded, dtype=torch.float32)
    model = get_peft_model(expanded, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = model.config.num_hidden_layers
    assert len(adapters) == blocks * 4, len(adapters)
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    proved(f"LoRA on {blocks} blocks: the original's logits before, loss {losses[0]:.3f} → {losses[-1]:.3f} in 5 steps")


if __name__ == "__main__":
    main()
