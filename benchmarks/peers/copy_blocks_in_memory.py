"""The method as the paper describes it (arXiv 2401.02415, section 3.2), for comparison: the whole model in memory.

It loads the model with transformers, copies blocks with their two output projections set to zero, and saves the
result. It runs in the project's own environment (torch and transformers, as pinned in requirements.txt):

python benchmarks/peers/copy_blocks_in_memory.py --source HF_DIR --target HF_DIR --num_added_blocks N
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def identity_copy(block: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a block that adds nothing to the residual stream."""
    added = copy.deepcopy(block)
    with torch.no_grad():
        added.self_attn.o_proj.weight.zero_()
        added.mlp.down_proj.weight.zero_()
    return added


def main() -> None:
    """Load, add a copied block after every group of blocks, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--num_added_blocks", type=int, required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype="auto")
    blocks = list(model.model.layers)
    # The paper divides the blocks into equal groups. If the count does not divide, groups differ by one block.
    ends = {len(blocks) * group // args.num_added_blocks - 1 for group in range(1, args.num_added_blocks + 1)}
    layers = []
    for index, block in enumerate(blocks):
        layers += [block, identity_copy(block)] if index in ends else [block]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.save_pretrained(args.target, max_shard_size="5GB")


if __name__ == "__main__":
    main()
