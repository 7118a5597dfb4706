"""What every reader is given, and how it says what it proved.

Imports nothing but the standard library: it runs in other tools' environments.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def folders(description: str | None) -> argparse.Namespace:
    """`original` and `expanded` (Hugging Face), `megatron` (torch_dist, of `expanded`), and an empty `work_dir`."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("original", "expanded", "megatron", "work_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def proved(text: str) -> None:
    """Say what was proved, told apart from what the tool itself prints."""
    print(f"proved: {text}", flush=True)
