"""Megatron-Bridge: its loader reads the converter's torch_dist folder. Every weight equals the result of its own import
of the same model from Hugging Face's format. Runs like peers/megatron_bridge_import.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from folders import folders, proved

sys.path.append(str(Path(__file__).resolve().parents[1] / "peers"))
from megatron_bridge_import import import_bridge, llama_provider

from megatron_llamapro.runtime import cpu


def main() -> None:
    """Load both ways, and compare."""
    args = folders(__doc__)
    cpu.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    bridge = import_bridge().AutoBridge.from_hf_pretrained(args.expanded, torch_dtype=torch.float32)
    imported, loaded = (
        llama_provider(bridge, load_weights=load).provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=True
        )
        for load in (True, False)
    )
    from megatron.bridge.training.checkpointing import _load_model_weights_from_checkpoint

    _load_model_weights_from_checkpoint(str(args.megatron), loaded)
    wanted, got = (dict(model[0].named_parameters()) for model in (imported, loaded))
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    proved(f"its loader and its own import give the same {len(got)} weights, bit for bit")


if __name__ == "__main__":
    main()
