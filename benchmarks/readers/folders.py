"""The arguments of every reader, and the line with which it reports its proof.

Imports only the standard library, because it runs in other tools' environments.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def folders(description: str | None) -> argparse.Namespace:
    """Parse `original` and `expanded` (Hugging Face), `megatron` (`expanded` in torch_dist) and an empty `work_dir`."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("original", "expanded", "megatron", "work_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def proved(text: str) -> None:
    """Print a proof, with a prefix that tells it from the tool's own output."""
    print(f"proved: {text}", flush=True)
