"""Rewrite two_nodes.sbatch: python tests/launch/renew.py"""

from test_slurm import GOLDEN, ROOT, script

GOLDEN.write_text(script(ROOT / "examples/slurm/two_nodes.yaml"))
