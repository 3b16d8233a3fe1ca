"""Puts the checkout on the path, so that tests find `headrace` and `tests.support` installed or not."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
