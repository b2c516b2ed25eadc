"""``compare_benchmarks``: compares two results of ``benchmark``, cell by cell, without importing torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peftlab.bench.compare import compare_results
from peftlab.measuring import journal


def compare_benchmarks(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """Compares two results of ``benchmark``, cell by cell; see ``bench.compare``.

    Args: a, b: a folder or its bench.json. Raises: RecipeError (result missing), ArtifactError (damaged, or a different workload).
    """
    return compare_results(journal.read_result(Path(a)), journal.read_result(Path(b)), (os.fspath(a), os.fspath(b)))
