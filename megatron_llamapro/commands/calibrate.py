"""What tools/plan_pipeline.py --calibrate does once its options are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_llamapro.checkpoint.description import describe_model
from megatron_llamapro.config.files import check_can_hold, write_atomically
from megatron_llamapro.config.schema import RunConfig
from megatron_llamapro.expansion.inits import Expansion
from megatron_llamapro.runtime.upstream import import_megatron


def run(config: RunConfig, args: argparse.Namespace, expansion: Expansion | None) -> int:
    """Time the blocks on the ranks that were started (one tensor-parallel group), and write what was found."""
    check_can_hold(args.calibrate)
    model = describe_model(Path(config.model.checkpoint), hf_config=args.hf_config, expansion=expansion)

    import torch.distributed as dist

    from megatron_llamapro.runtime import cpu
    from megatron_llamapro.runtime.distributed import start_world, stop_world

    import_megatron()
    cpu.install()
    from megatron_llamapro.training.calibration import calibrate

    start_world()
    try:
        measured = calibrate(config, model.shape)
        if dist.get_rank() == 0:
            write_atomically(args.calibrate, json.dumps(measured, indent=2) + "\n")
            for kind, times in measured.items():
                print(
                    f"{kind:>9}: forward {1e3 * times['forward']:8.2f} ms, backward {1e3 * times['backward']:8.2f} ms"
                )
    finally:
        stop_world()
    return 0
