"""Writes JSON files atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, document: Any) -> None:
    """Writes JSON and renames it, so that a reader sees the old or the new file; non-finite floats become text."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(finite(document), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """``value`` with inf and nan, which JSON lacks, replaced by their names."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
