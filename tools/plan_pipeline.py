"""The split of layers over pipeline stages with the least step time, beside the even one.

python tools/plan_pipeline.py --config run.yaml --world_size 16 --parallel.pipeline_model_parallel_size 4
    [--memory_gib 80] [--output parallel.yaml] [--json]
python tools/plan_pipeline.py --config run.yaml --world_size 1 --calibrate times.json     measure the blocks here first

The model need not be converted yet: --hf_config DIR --num_added_blocks N. Any field of the configuration can be
overridden by its dotted name, as for pretrain. docs/planning.md says what is assumed.
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.commands.expansion_options import add_expansion_options, read_expansion_options
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.planning.duration import add_options


def main() -> int:
    """Read the options, plan."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--world_size", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--memory_gib", type=float, metavar="GIB", help="that a rank may hold (default: no limit)")
    add_options(parser)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="block times that --calibrate measured")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure block times, write them, end")
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="write the layout, for pretrain's --config")
    parser.add_argument("--hf_config", type=Path, metavar="DIR", help="a model that is not converted yet: config.json")
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds and bytes")
    add_expansion_options(parser)
    args, run_args = parser.parse_own_args()

    from megatron_llamapro.config.io import parse_run_config

    config, expansion = parse_run_config(run_args), read_expansion_options(parser, args)
    if args.calibrate:
        from megatron_llamapro.commands.plan_pipeline import run_calibration as run
    else:
        from megatron_llamapro.commands.plan_pipeline import run
    return run(config, args, expansion)


if __name__ == "__main__":
    run_command(main)
