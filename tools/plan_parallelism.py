"""How many tensor-parallel ranks, stages and replicas: the divisions of a job's ranks with the least step time.

python tools/plan_parallelism.py --config run.yaml --world_size 64 [--memory_gib 70] [--output parallel.yaml] [--json]

The model need not be converted yet: --hf_config DIR --num_added_blocks N. Batch sizes are the configuration's, and any
field of it can be overridden by its dotted name, as for pretrain. docs/planning.md says what is assumed.
"""

from __future__ import annotations

from pathlib import Path

import _package  # noqa: F401
from megatron_llamapro.commands.expansion_options import add_expansion_options, read_expansion_options
from megatron_llamapro.config.command import CommandParser, run_command
from megatron_llamapro.planning.duration import add_options
from megatron_llamapro.planning.network import Network


def main() -> int:
    """Read the options, search."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--world_size", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--memory_gib", type=float, default=70, metavar="GIB", help="that a rank may hold (default: 70, of 80 GB)"
    )
    parser.add_argument("--ranks_per_node", type=int, default=Network.ranks_per_node, metavar="N", help="default: 8")
    parser.add_argument(
        "--within_node_gb",
        type=float,
        default=Network.within_node / 1e9,
        metavar="N",
        help="GB/s a rank sends in a node (default: NVLink)",
    )
    parser.add_argument(
        "--between_nodes_gb",
        type=float,
        default=Network.between_nodes / 1e9,
        metavar="N",
        help="to others (default: 400 Gbit/s for each rank)",
    )
    add_options(parser)
    parser.add_argument("--at_most", type=int, default=5, metavar="N", help="divisions to print (default: 5)")
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="write the best one, for pretrain's --config")
    parser.add_argument("--hf_config", type=Path, metavar="DIR", help="a model that is not converted yet: config.json")
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds and bytes")
    add_expansion_options(parser)
    args, run_args = parser.parse_own_args()

    from megatron_llamapro.commands.plan_parallelism import run
    from megatron_llamapro.config.io import parse_run_config

    return run(parse_run_config(run_args), args, read_expansion_options(parser, args))


if __name__ == "__main__":
    run_command(main)
