"""Writes the tables of bench/RESULTS.md, README.md and docs/ from the files in bench/results/.

    python -m bench.write_results

Each table is between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``; the text around it is written by hand. ``make conformance
ARGS=--write-results`` writes the tables of the conformance suites. The ``--report`` of gpu-check also writes its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT, tables
from bench.gpu_check import claims, pending
from bench.gpu_check.journal import JOURNAL
from bench.peers import distillation as distilled_by_peers
from bench.peers import report as peers_report
from bench.studies import call_overhead, cpu_path, distillation, embedding_probe, linear_losses, loss_curves, methods
from peftlab.measuring.journal import read_records

PAGE, README, DISTILLATION = ROOT / "bench" / "RESULTS.md", ROOT / "README.md", ROOT / "docs" / "distillation.md"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _confirmed() -> str:
    path = RESULTS / JOURNAL
    return pending.confirmed(read_records(path) if path.is_file() else [], claims.load())


def _short_distillation() -> str:
    results = result("distillation")
    return distillation.table({name: results[name] for name in distillation.SHORT})


def _cpu_paths() -> str:
    return "\n\n".join(cpu_path.table(result(path.stem)) for path in sorted(RESULTS.glob("cpu_path-*.json")))


def _methods() -> str:
    names = [name for name in ("MiniLM", "SmolLM2") if (RESULTS / f"methods-{name.lower()}-cpu.json").is_file()]
    return methods.speed_table({name: result(f"methods-{name.lower()}-cpu") for name in names})


# (file, marker) -> function that returns the table.
TABLES: dict[tuple[Path, str], Callable[[], str]] = {
    (README, "peers"): lambda: peers_report.short_table(RESULTS),
    (README, "distillation"): _short_distillation,
    (DISTILLATION, "distillation"): lambda: distillation.table(result("distillation")),
    (PAGE, "peers"): lambda: peers_report.tables(RESULTS),
    (PAGE, "cpu_kd"): lambda: distilled_by_peers.table(result("cpu_kd")),
    (PAGE, "cpu_path"): _cpu_paths,
    (PAGE, "loss_curves"): lambda: loss_curves.tables(result("loss_curves")),
    (PAGE, "linear_losses"): lambda: linear_losses.table(result("linear_losses")),
    (PAGE, "call_overhead"): lambda: call_overhead.table(result("call_overhead")),
    (PAGE, "embedding_probe"): lambda: embedding_probe.table(result("embedding_probe")),
    (PAGE, "methods"): _methods,
    (PAGE, "methods_quality"): lambda: methods.quality_table(result("methods-quality-cpu")),
    (PAGE, "gpu_check"): _confirmed,
}


def main() -> int:
    for (path, name), made in TABLES.items():
        tables.replace_section(path, name, made())
    return 0


if __name__ == "__main__":
    sys.exit(main())
