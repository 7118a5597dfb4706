"""docs/converter.md: its commands do what it says, and every option it names exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pages import ROOT, commands, run

from megatron_llamapro.checkpoint.formats.checkpoint import Format
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify

PAGE = "docs/converter.md"


def whole(command: str) -> str:
    """Return a command of the page with its optional parts."""
    return command.translate({ord("["): None, ord("]"): None})


def test_its_commands_run(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    to_megatron, to_hf, divided, expanded, dialed = map(whole, commands(PAGE)[:5])
    source, folders = tiny_llama(num_hidden_layers=8), {name: tmp_path / name for name in "abcd"}
    run(to_megatron.replace("HF_DIR", str(source)).replace(" DIR", f" {folders['a']}"), ROOT)
    run(to_hf.replace("HF_DIR", str(folders["b"])).replace(" DIR", f" {folders['a']}"), ROOT)
    run(
        divided.replace("--source DIR", f"--source {folders['a']}").replace("--target DIR", f"--target {folders['c']}"),
        ROOT,
    )
    run(expanded.replace("--source HF_DIR", f"--source {source}").replace("HF_DIR", str(folders["d"])), ROOT)
    run(dialed.replace("--source HF_DIR", f"--source {folders['b']}").replace("HF_DIR", str(tmp_path / "e")), ROOT)
    assert str(inspect(tmp_path / "e").dial) == "× 0.75"
    formats = [inspect(folder).format for folder in folders.values()]
    assert formats == [Format.TORCH_DIST, Format.HUGGING_FACE, Format.LEGACY, Format.HUGGING_FACE]
    for folder in folders.values():
        assert all(check.ok for check in verify(source, folder, quick=True))
        assert inspect(folder).plan.num_layers == 16


def test_every_option_it_names_exists() -> None:
    programs = [
        *(f"llamapro {name}" for name in ("convert", "expand", "verify", "inspect")),
        "llamapro convert hf-to-megatron",
        "llamapro convert megatron-to-hf",
        "llamapro convert hf-to-hf",
        "python benchmarks/convert.py",
    ]
    known = set(re.findall(r"--\w+", " ".join(run(f"{program} --help", ROOT) for program in programs)))
    named = set(re.findall(r"--[a-z][\w-]+", (ROOT / PAGE).read_text())) - {"--ckpt-format"}  # Megatron-LM's
    assert len(named) > 15
    assert named <= known, named - known
