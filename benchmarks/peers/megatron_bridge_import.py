"""Megatron-Bridge's import of a Hugging Face checkpoint, on the CPU, without added blocks (it has none).

benchmarks/venvs.py makes its environment: torch 2.13.0, megatron-core 0.16.1 and megatron-bridge 0.3.1, without the
dependencies that need CUDA (Transformer Engine, mamba-ssm, …), and with all others. Run it with this repository in
PYTHONPATH, for the substitutions that let megatron.core run without a GPU:

PYTHONPATH=. VENV/bin/python benchmarks/peers/megatron_bridge_import.py --source HF_DIR --target DIR

Megatron-Bridge imports Transformer Engine only for fine-tuning adapters. A stand-in replaces it and is never used.
Layers are those of its `local_layer_spec`, the only ones that run without Transformer Engine.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path

import torch

from megatron_llamapro.runtime import cpu


class _AnyClass(type):
    """Metaclass of classes whose every attribute is such a class."""

    def __getattr__(cls, name: str) -> type:
        return _AnyClass(name, (), {})


class _StandIn(types.ModuleType):
    """A module in which every name is such a class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {})


def import_bridge() -> types.ModuleType:
    """Import the package with the stand-in in place of Transformer Engine. megatron.core is imported first, so that it
    sees no Transformer Engine."""
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    package, pytorch = _StandIn("transformer_engine"), _StandIn("transformer_engine.pytorch")
    package.pytorch = pytorch
    sys.modules.update({"transformer_engine": package, "transformer_engine.pytorch": pytorch})
    return importlib.import_module("megatron.bridge")


def llama_provider(bridge, *, load_weights: bool):
    """Return Megatron-Bridge's model provider with settings that run on the CPU."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider = bridge.to_megatron_provider(load_weights=load_weights)
    provider.transformer_layer_spec = local_layer_spec
    provider.persist_layer_norm = provider.masked_softmax_fusion = provider.apply_rope_fusion = False
    provider.gradient_accumulation_fusion = False
    provider.hetereogenous_dist_checkpoint = True  # one key per layer, as this converter writes
    provider.finalize()
    return provider


def main() -> None:
    """Import the checkpoint in one process, with gloo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    args = parser.parse_args()
    cpu.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    bridge = import_bridge().AutoBridge.from_hf_pretrained(args.source, torch_dtype=torch.bfloat16)
    provider = llama_provider(bridge, load_weights=True)
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True, bf16=True)
    bridge.save_megatron_model(model, args.target, low_memory_save=True)


if __name__ == "__main__":
    main()
