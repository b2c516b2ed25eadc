"""Programs that measure and check peftlab; none is installed. ``python -m bench.NAME``, from the repository root.

Whatever program of this package starts, this file runs first: it puts the code of this tree on the path, so that a tree copied
to another machine runs with nothing but an interpreter, and ahead of a peftlab that is installed there.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

sys.path[:0] = [folder for folder in map(str, (ROOT, ROOT / "kernels")) if folder not in sys.path]
