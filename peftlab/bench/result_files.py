"""Writes bench.json and bench.csv, each by a rename."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Figures with a spread: columns of the table.
SPREADS = ("tokens_per_s", "examples_per_s", "step_s", "tflops", "share_of_peak", "peak_bytes", "joules_per_token")
_PLAIN = ("what", "method", "rank", "quantize", "kernels", "batch", "length", "adapters", "status", "reason")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def csv_text(cells: Sequence[Mapping[str, Any]]) -> str:
    """Returns a line per cell with the figures of bench.json, empty if missing."""
    columns = [*_PLAIN, "repetitions"]
    columns += [f"{name}_{part}" for name in SPREADS for part in ("median", "q1", "q3", "low", "high")]
    columns += ["load_peak_bytes", "increase_bytes", "num_trained", "num_fused", "num_adapted", "first_loss", "pareto"]
    columns += [
        "baseline",
        *(f"{name}_{part}" for name in ("speed", "memory_ratio") for part in ("value", "low", "high")),
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for cell in cells:
        row = {name: cell[name] for name in columns if cell.get(name) is not None}
        for name in (*SPREADS, "speed", "memory_ratio"):
            row |= {f"{name}_{part}": v for part, v in (cell.get(name) or {}).items() if v is not None}
        row |= {name: cell["memory"][name] for name in ("load_peak_bytes", "increase_bytes") if "memory" in cell}
        if cell.get("losses"):
            row["first_loss"] = cell["losses"][0]
        writer.writerow(row)
    return text.getvalue()
