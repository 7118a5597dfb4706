"""Lets `python -m tools.NAME` find what `python tools/NAME.py` finds: the module beside it, `_package`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
