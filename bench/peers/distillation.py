"""Distills the same student on the same rows with peftlab and with TRL's two trainers, and compares time and memory.

    python -m bench.peers.distillation [CASE ...] [--repeats 3] [--rows N] [--steps N] [--threads 1] [--out DIR]

The teacher is SmolLM2-135M and the student has all of its layers but ten. The data is film dialogs and the loss forward KL at
temperature 1. For each case one process writes the student, its first adapter and the stored targets. Then each repetition runs
one process per engine, in alternating order (``distillation_engines.py`` has the engines). The models have no dropout, so the
timed runs are their own gate.

The gate: engines with an online teacher define the same loss (tests/conformance), so their first losses must agree within the
limits of ``bench.peers``: 1e-4 at the first step, 1e-3 after it. Stored targets define another loss: KL over the 50 most likely
classes and one class for all others. It is never more than KL over all classes (up to the error of storing in float16, 2e-3).
Each repetition is judged when it ends. Beyond those limits nothing more runs, no figure is kept, and the exit code is 6.

Exit codes: 0 done, 1 a run failed, 2 wrong usage, 6 the engines train differently.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.peers import report
from bench.peers.cases import CASES as ADAPTED
from bench.peers.gate import FIRST_LIMIT, LATER_LIMIT, loss_differences
from bench.peers.processes import RunFailed, run_engine, say
from bench.records import provenance, write_json
from bench.studies import kd_plan
from bench.tables import spread, where

STORED_LIMIT = 2e-3
NUM_LAYERS = 20
ENGINES = {
    "online": "peftlab",
    "cached": "peftlab, stored top-50",
    "gkd": "TRL GKDTrainer",
    "distillation": "TRL DistillationTrainer",
}
# (faster engine, slower engine): the ratios of the table.
PAIRS = (("online", "gkd"), ("online", "distillation"), ("cached", "online"))
_DIALOG = ADAPTED["dialog"]
TEACHER = _DIALOG.recipe["model"]["name"]
CASES = {
    "lora": {"adapter": _DIALOG.recipe["adapter"]},
    "full": {"adapter": {"method": "none"}, "train": {**_DIALOG.recipe["train"], "lr": 5e-5}},
}
RESULT = "cpu_kd.json"


def settings_of(name: str, work: Path, *, rows: int, eval_rows: int, steps: int) -> dict[str, Any]:
    """The recipe of a case."""
    recipe = {**_DIALOG.recipe, **CASES[name]}
    return {
        **recipe,
        "model": {"name": str(work / "student")},
        "data": {**recipe["data"], "train": f"{_DIALOG.data}#{rows + eval_rows}", "eval_rows": eval_rows},
        "train": {**recipe["train"], "max_steps": steps, "precision": "float32"},
        "run": {**recipe["run"], "device": "cpu"},
        "distill": {"teacher": {"name": TEACHER}, "baseline": False},
    }


def judge(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Whether the engines train the same, by their losses of each step."""
    report: dict[str, Any] = {"losses": losses, "relative_differences": {}}
    for engine in ("gkd", "distillation"):
        report["relative_differences"][engine] = loss_differences(losses["online"], losses[engine])
    first = max(d[0] for d in report["relative_differences"].values())
    largest = max(max(d) for d in report["relative_differences"].values())
    # Only at the first step: afterwards the two students differ.
    stored = losses["cached"][0] / losses["online"][0]
    limits = {"first": FIRST_LIMIT, "largest": LATER_LIMIT, "stored_over_online": 1 + STORED_LIMIT}
    passed = first <= FIRST_LIMIT and largest <= LATER_LIMIT and 0 < stored <= 1 + STORED_LIMIT
    return {
        **report,
        "first": first,
        "largest": largest,
        "stored_over_online": stored,
        "limits": limits,
        "passed": passed,
    }


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The repetitions of one case; without a summary if the engines train differently."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        settings = settings_of(name, work, rows=options.rows, eval_rows=options.eval_rows, steps=options.steps)
        spec = {"adapter": str(work / "adapter"), "cache": str(work / "cache"), "num_layers": NUM_LAYERS}

        def measure(engine: str) -> dict[str, Any]:
            return run_engine("bench.peers.distillation_engines", {**spec, "engine": engine, "recipe": settings}, work)

        shared = measure("init")
        judged: list[dict[str, Any]] = []
        while len(judged) < options.repeats and all(verdict["passed"] for verdict in judged):
            measured = {}
            for engine in list(ENGINES) if len(judged) % 2 == 0 else list(ENGINES)[::-1]:
                load = os.getloadavg()[0]
                measured[engine] = measure(engine)
                place = {"repetition": len(judged), "position": len(rows), "load_before": load}
                rows.append({**place, **measured[engine]})
                say(f"{name}: repetition {len(judged) + 1}, {ENGINES[engine]}: {measured[engine]['seconds']:.2f} s")
            judged.append(judge({engine: row["losses"] for engine, row in measured.items()}))
            say(f"{name}: losses differ by {judged[-1]['first']:.1e} at step 1, at most {judged[-1]['largest']:.1e}")
        shown = json.loads(json.dumps(settings).replace(str(work), "."))
    worst = max(judged, key=lambda verdict: (not verdict["passed"], verdict["largest"]))
    passed = worst["passed"]
    return {
        "case": name,
        "settings": shown,
        "shared": shared,
        "gate": worst,
        "predicted": predicted(name, rows) if passed else None,
        "rows": rows,
        "summary": summarize(rows) if passed else None,
        **provenance(_command(options)),
    }


def predicted(name: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """FLOPs of the measured steps by kd_plan.py, and their ratio with an online teacher to stored targets."""
    from peftlab.models import find_pretrained, load_skeleton

    row = rows[0]
    teacher = kd_plan.shape_of(load_skeleton(find_pretrained(TEACHER), auto_class="AutoModelForCausalLM"))
    student = teacher.with_layers(NUM_LAYERS)
    rank = CASES[name]["adapter"].get("rank")
    sizes = {"tokens": row["tokens"], "scored": row["trained_tokens"]}
    cached = kd_plan.train_flops(student, **sizes, rank=rank, recompute=False)
    online = cached + kd_plan.forward_flops(teacher, **sizes)
    return {"online_flops": online, "cached_flops": cached, "online_over_cached": online / cached}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of each engine, and ratios: above 1 the first of a pair is faster or smaller."""
    by_engine = {e: sorted((r for r in rows if r["engine"] == e), key=lambda r: r["repetition"]) for e in ENGINES}
    ratios = {
        f"{ours} against {theirs}": {
            figure: report.ratio_of(by_engine[ours], by_engine[theirs], itemgetter(figure))
            for figure in ("seconds", "cpu_seconds", "peak_rss_bytes")
        }
        for ours, theirs in PAIRS
    }
    return {
        "engines": {e: report.engine_figures(repetitions) for e, repetitions in by_engine.items()},
        "ratios": ratios,
    }


def table(results: dict[str, Any]) -> str:
    """The Markdown of bench/RESULTS.md."""
    parts = []
    for name, r in results.items():
        engines, shared = r["summary"]["engines"], r["shared"]
        lines = ["| engine | seconds | CPU seconds | tokens/s | padded tokens | peak RSS, MiB | held-out loss after |"]
        lines.append("|" + "---|" * 7)
        for engine, title in ENGINES.items():
            e = engines[engine]
            cells = [spread(e["seconds"], 2), spread(e["cpu_seconds"], 2)]
            cells += [spread(e["tokens_per_s"], 0), spread(e["padded_tokens"], 0)]
            cells += [spread(e["peak_rss_bytes"], 0, report.MIB), spread(e["after_loss"], 4)]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        lines += ["", "| | speed, times | by CPU time | peak RSS, times less |", "|---|---|---|---|"]
        for pair, ratios in r["summary"]["ratios"].items():
            ours, theirs = (ENGINES[e] for e in pair.split(" against "))
            lines.append(f"| {ours} against {theirs} | {' | '.join(map(report.ratio_text, ratios.values()))} |")
        first, gate = r["rows"][0], r["gate"]
        parts.append(
            f"**`{name}`**: {shared['student']['parameters'] / 1e6:.1f}M of {shared['student']['of'] / 1e6:.1f}M parameters, "
            f"{first['steps'] - 1} steps, {first['tokens']:,} tokens of which {first['trained_tokens']:,} are scored, "
            f"{len(r['rows']) // len(ENGINES)} repetitions. Gate: losses within {gate['first']:.1e} at step 1 and "
            f"{gate['largest']:.1e} over all steps and runs; stored targets at step 1 "
            f"{gate['stored_over_online']:.3f} of the online loss. Stored: {shared['captured']['bytes_per_position']:.0f} bytes a "
            f"position, {shared['captured']['seconds']:.1f} s once. Predicted by FLOPs, online over cached: "
            f"{r['predicted']['online_over_cached']:.2f}. {where(r)}, threads: {first['threads']}. `{r['command']}`"
        )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _command(options: argparse.Namespace) -> str:
    sizes = [f"--{k} {getattr(options, k)}" for k in ("repeats", "rows", "steps", "threads")]
    return " ".join(["python -m bench.peers.distillation", *options.cases, *sizes])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=88, help="training rows")
    parser.add_argument("--eval-rows", type=int, default=8, help="held-out rows")
    parser.add_argument("--steps", type=int, default=11, help="optimizer steps of 8 rows; the first warms up")
    parser.add_argument("--threads", type=int, default=1, help="repetitions of each engine")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {RESULT}")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"unknown case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    batch = _DIALOG.recipe["train"]["batch_size"]
    if options.steps < 2 or options.rows < options.steps * batch:
        parser.error(
            f"--steps must be at least 2, and --rows at least {batch} per step, {options.steps * batch} in total"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    path = options.out / RESULT
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the engines, which are separate processes
    refused = []
    try:
        for name in options.cases or CASES:
            result = run_case(name, options)
            if result["summary"] is None:
                refused.append(name)
                say(f"{name}: refused, the engines do not train the same: {json.dumps(result['gate'])}")
                continue
            write_json(path, results := {**results, name: result})
            for pair, ratios in result["summary"]["ratios"].items():
                say(f"{name}: {pair}: " + ", ".join(f"{k} {report.ratio_text(v)}" for k, v in ratios.items()))
    except RunFailed as error:
        say(str(error))
        return 1
    return 6 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
