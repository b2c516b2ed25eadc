"""Collects the figures of the shipped distillations from the report cards of their runs.

    python -m bench.studies.distillation RUN ...     adds the cards of these run folders to bench/results/distillation.json

A run comes from the recipe's own command, such as ``peftlab distill film-student``. A new run of a recipe replaces the old one.
Cards are stored with metrics and intervals, costs, every seed and the verdict, and with the versions and fingerprints of the
run's lock. Versions are those of the run, hardware and commit those of the collection.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.records import provenance, write_json

RESULT = RESULTS / "distillation.json"
# recipe -> (what is measured, metric of the card, digits).
SHOWN = {
    "digits-missing-class": ("recall of a digit that the student never saw", "recall_3"),
    "digits-few-labels": ("accuracy, 100 labelled images", "accuracy"),
    "digits-unlabelled": ("accuracy, 1,200 images without labels", "accuracy"),
    "docstrings-student": ("accuracy, 8 classes, 240 labels and 8,000 texts without", "accuracy"),
    "film-student": ("accuracy, all 8,484 labels for both", "accuracy"),
    "minilm-student": ("rank correlation with the teacher's similarities, 3 of 6 layers", "spearman"),
    "smollm2-student": ("KL to the teacher in nats, 24 of 30 layers", "kl"),
}
# The README shows these; docs/distillation.md shows all.
SHORT = ("digits-few-labels", "digits-unlabelled", "docstrings-student", "film-student")
# The teacher's own value of a metric that compares with the teacher.
_PERFECT = {"spearman": "1", "kl": "0"}
_KEPT = ("headline", "num_rows", "num_seeds", "metrics", "costs", "ratios", "timed_on", "seeds", "verdict", "notes")


def collected(run: Path) -> tuple[str, dict[str, Any]]:
    """Name of the recipe and the stored part of its run."""
    from peftlab.recipe import load_recipe

    report = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if report["name"] not in SHOWN or report["status"] != "finished":
        raise SystemExit(
            f"{run}: expected a finished run of {', '.join(SHOWN)}, found {report['name']} ({report['status']})"
        )
    lock = load_recipe(run / "recipe.lock.yaml").recipe.lock or {}
    return report["name"], {
        "card": {name: report["card"][name] for name in _KEPT if name in report["card"]},
        "seconds": report["seconds"],
        "versions": {"peftlab": lock["peftlab"], **lock["packages"]},
        "fingerprints": lock["fingerprints"],
        **{k: v for k, v in provenance(f"peftlab distill {report['name']}").items() if k != "versions"},
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| recipe | measure | teacher | labels alone | distilled | |", "|---|---|---|---|---|---|"]
    for name, (what, metric) in SHOWN.items():
        if name not in results:
            continue
        card = results[name]["card"]
        row = next(m for m in card["metrics"] if m["name"] == metric)
        teacher = _PERFECT.get(metric) or _value(row["teacher"])
        student = _value(row["student"]) + (f" ({_value(row['cut'])} as cut)" if row["cut"] else "")
        baseline = _value(row["baseline"]) or "no labels"
        seeds = card["num_seeds"]
        verdict = "no difference; " if card["verdict"]["outcome"] == "no_difference" else ""
        lines.append(
            f"| `{name}` | {what} | {teacher} | {baseline} | {student} | {verdict}{seeds} seed{'s' if seeds != 1 else ''} |"
        )
    return "\n".join(lines)


def _value(interval: dict[str, Any] | None) -> str:
    return "" if interval is None else f"{interval['value']:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = parser.parse_args()
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    results |= dict(map(collected, options.runs))
    write_json(RESULT, {name: results[name] for name in SHOWN if name in results})
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
