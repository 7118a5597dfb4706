"""Reads a config.json with a version of transformers. Imports nothing of this package, so that environments without it
can run this file: `python transformers_reading.py CASES.jsonl READINGS.jsonl`, one configuration per line.

A reading describes the model, or is an `error`. It has the `frequencies` of the rotary embeddings, the `shapes` of the
weights by their names in the file, and the `logits` on `TOKENS`. Each `weight` depends only on its name and shape.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

TOKENS = [[5, 3, 60, 1, 1, 17, 42, 8, 33, 2, 50, 21]]


def weight(name: str, shape: tuple[int, ...]) -> Any:
    """Return a float32 tensor that is the same in every process."""
    import torch

    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.2 * noise if "norm" in name else 0.3 * noise


def frequencies(config: dict) -> list[float]:
    """Return the frequencies of the rotary embeddings. Raises whatever transformers raises."""
    with tempfile.TemporaryDirectory() as folder:
        read = _read(config, Path(folder))
    family = read.model_type
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{family.capitalize()}RotaryEmbedding")(config=read)
    assert rotary.attention_scaling == 1
    return rotary.inv_freq.tolist()


def logits(config: dict, shapes: dict[str, tuple[int, ...]]) -> list:
    """Return the logits of a checkpoint with exactly these tensors. Raises whatever transformers raises, and ValueError
    if the model needs other tensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        _read(config, Path(folder))
        tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"the tensors do not fit: {wrong}")
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS), use_cache=False, return_dict=True).logits.tolist()


def _read(config: dict, folder: Path) -> Any:
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def reading(config: dict, shapes: dict | None) -> dict:
    """Return the reading of a configuration. It includes logits only if `shapes` names the tensors."""
    try:
        found: dict = {"frequencies": frequencies(config)}
        if shapes is not None:
            found["logits"] = logits(config, shapes)
        return found
    except Exception as error:  # any error of any version counts as a refusal
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def main(cases: str, readings: str) -> None:
    """Read every line of a file, `{"config": …, "shapes": … or null}`, and write one reading per line."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # the models are tiny
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open(cases) as lines, open(readings, "w") as out:
        for line in lines:
            case = json.loads(line)
            print(json.dumps(reading(case["config"], case["shapes"])), file=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
