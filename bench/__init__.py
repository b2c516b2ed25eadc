"""Programs that measure and check peftlab. They are not installed; run ``python -m bench.NAME`` from the repository root.

This file runs before every program of the package. It puts the code of this tree first on the path: a copied tree runs with only
an interpreter, and takes precedence over an installed peftlab.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

sys.path[:0] = [folder for folder in map(str, (ROOT, ROOT / "kernels")) if folder not in sys.path]
