"""Lets `python -m tools.NAME` import `_package`, the module beside it, as `python tools/NAME.py` does."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
