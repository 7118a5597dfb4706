"""The sbatch job that trains a run to its end, through time limits, preemption and lost nodes; printed, or submitted.

python tools/launch_slurm.py --config run.yaml --launch slurm.yaml [--submit] [--section.field value …]
python tools/launch_slurm.py --config run.yaml --launch slurm.yaml --by_hand HOST      without a scheduler

docs/cluster.md shows the way from a login node to a running job.
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.config.command import CommandParser, run_command


def main() -> int:
    """Read both configurations, print the job."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--launch", type=Path, required=True, metavar="FILE.yaml", help="nodes, SLURM, container, logs")
    parser.add_argument("--submit", action="store_true", help="also give it to sbatch")
    parser.add_argument("--by_hand", metavar="HOST", help="print what to type on every node instead; HOST is the first")
    args, run_args = parser.parse_own_args()

    from megatron_llamapro.commands.launch import run
    from megatron_llamapro.config.io import parse_run_config
    from megatron_llamapro.launch.config import read_launch_config

    config = parse_run_config(run_args)
    return run(read_launch_config(args.launch), config, run_args, by_hand=args.by_hand, submit=args.submit)


if __name__ == "__main__":
    run_command(main)
