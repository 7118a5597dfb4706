"""mergekit: a passthrough merge of the export returns the same tensors, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from folders import folders, proved
from safetensors.torch import load_file

_RECIPE = """
merge_method: passthrough
dtype: float32
slices:
  - sources:
      - model: {model}
        layer_range: [0, {num_layers}]
"""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all shards."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def main() -> None:
    """Merge, and compare."""
    args = folders(__doc__)
    recipe, merged = args.work_dir / "recipe.yaml", args.work_dir / "merged"
    num_layers = json.loads((args.expanded / "config.json").read_text())["num_hidden_layers"]
    recipe.write_text(_RECIPE.format(model=args.expanded, num_layers=num_layers))
    command = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([command, recipe, merged, "--copy-tokenizer"], check=True)
    given, got = tensors_of(args.expanded), tensors_of(merged)
    assert given.keys() == got.keys(), given.keys() ^ got.keys()
    assert all(torch.equal(given[name], got[name]) for name in given)
    proved(f"a passthrough merge of {num_layers} blocks gives the same {len(got)} tensors, bit for bit")


if __name__ == "__main__":
    main()
