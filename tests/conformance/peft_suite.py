"""Runs PEFT's own tests of its LoRA layers twice, with its layers and with the fused ones, and compares.

    git clone https://github.com/huggingface/peft ../peft
    make conformance ARGS='--peft-checkout ../peft --peft-seeds 0 1 2 3 4 --write-results'

The tests are read from that checkout and never copied. Its version need not match the installed PEFT exactly. What
counts is that no test fails with the fused layers that passes without them. Tests that need a model hub fail on both
sides if there is none. PEFT's tests import diffusers, parameterized and scipy.

Every test starts from the same seed on both sides, and all tests run with each seed. A test that fails with the fused
layers only is worse, unless rounding decides it (``Again.is_rounding``): from 200 seeds it always
passes in float64, and in float32 PEFT's own layers fail it too, and not less often than the fused ones.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PLUGIN = Path(__file__).with_name("peft_plugin.py")
# Those that need no model hub. test_velora.py is not among them: it asserts that VeLoRA keeps fewer bytes for backward
# than LoRA, 52,240 in its case, where the fused layers keep 31,744.
FILES = (
    "test_custom_models.py",
    "test_bdlora.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_riemannian_lora.py",
)
SIDES = {"peft": False, "fused": True}
REPEATS = 200


@dataclass(frozen=True)
class Again:
    """A test repeated with ``seeds`` seeds: how many did not pass, and the error of its layers against float64 (``Report`` in
    the plugin)."""

    seeds: int
    failed: dict[str, int]
    failed_float64: dict[str, int]
    error: dict[str, float]

    def is_rounding(self) -> bool:
        """Whether rounding decides the test. The counts may differ by three standard deviations of their difference."""
        peft, fused = self.failed["peft"], self.failed["fused"]
        return (
            self.seeds == REPEATS
            and not any(self.failed_float64.values())
            and peft > 0
            and fused <= peft + 3 * math.sqrt(peft + fused)
        )


def run(checkout: Path, tests: list[str], **settings: Any) -> dict[str, Any]:
    """The plugin's ``Report``. tests: arguments of pytest. settings: the plugin's ``Settings``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        shutil.copy(PLUGIN, folder)  # alone: no other file of bench/ may hide a module of PEFT's tests
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
            "PEFTLAB_PEFT_SUITE": json.dumps({"report": str(report), **settings}),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts="),
            *("--continue-on-collection-errors", "-p", PLUGIN.stem, *tests),
        ]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not report.is_file():
            raise SystemExit(f"pytest did not run: {(done.stdout + done.stderr)[-2000:]}")
        loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return loaded


def run_both(checkout: Path, tests: list[str], **settings: Any) -> dict[str, dict[str, Any]]:
    """The reports of both sides. They run at the same time: nothing is timed, and each has one thread."""
    with ThreadPoolExecutor(len(SIDES)) as pool:
        futures = {side: pool.submit(run, checkout, tests, fused=fused, **settings) for side, fused in SIDES.items()}
        return {side: future.result() for side, future in futures.items()}


def again(checkout: Path, test: str) -> Again:
    function = [test.partition("[")[0]]
    reports = run_both(checkout, function, only=test, repeats=REPEATS, measure=True)
    reports64 = run_both(checkout, function, only=test, repeats=REPEATS, float64=True)
    return Again(
        min(len(side["outcomes"]) for side in [*reports.values(), *reports64.values()]),
        {side: len(not_passed(report)) for side, report in reports.items()},
        {side: len(not_passed(report)) for side, report in reports64.items()},
        {side: reports["fused"][f"error_{side}"] for side in SIDES},
    )


def not_passed(report: dict[str, Any]) -> set[str]:
    return {test for test, outcome in report["outcomes"].items() if outcome != "passed"}


def counts(report: dict[str, Any]) -> dict[str, int]:
    return {kind: list(report["outcomes"].values()).count(kind) for kind in ("passed", "failed", "skipped")}


def failing_only(side: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Tests that pass on the other side and fail or are missing on this side."""
    return {t for t, o in other["outcomes"].items() if o == "passed" and side["outcomes"].get(t) != "passed"}


def commit_of(checkout: Path) -> dict[str, str]:
    command = ["git", "log", "-1", "--format=%H %cs"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    commit, _, date = done.stdout.strip().partition(" ")
    return {"commit": commit or "unknown", "date": date or "unknown"}


def compare(checkout: Path, files: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The content of results/peft_suite.json; ``worse`` must be empty.

    Raises: LookupError: the checkout has no such files, or no test passed with PEFT's own layers, so that nothing is compared.
    """
    if missing := [name for name in files if not (checkout / "tests" / name).is_file()]:
        raise LookupError(f"{checkout / 'tests'} has no {', '.join(missing)}: give the folder of a PEFT checkout")
    rows, candidates, better, version = [], set(), set(), ""
    for seed in seeds:
        reports = run_both(checkout, [f"tests/{name}" for name in files], seed=seed)
        for side, report in reports.items():
            rows.append({"seed": seed, "side": side, **counts(report), "fused_forwards": report["fused_forwards"]})
            version = report["peft"]
        if not rows[-2]["passed"]:
            raise LookupError("no test passed with PEFT's own layers: nothing is compared")
        candidates |= failing_only(reports["fused"], reports["peft"])
        better |= failing_only(reports["peft"], reports["fused"])
    examined = {test: again(checkout, test) for test in sorted(candidates)}
    return {
        "peft": version,  # of the checkout, where PYTHONPATH has its sources
        "tests": {"repository": "huggingface/peft", **commit_of(checkout)},
        "runs": rows,
        "worse": {test: asdict(rerun) for test, rerun in examined.items() if not rerun.is_rounding()},
        "rounding": {test: asdict(rerun) for test, rerun in examined.items() if rerun.is_rounding()},
        "passes_only_with_fused": sorted(better),
    }


def table(result: dict[str, Any]) -> str:
    """A Markdown table with a line per seed and side, then the tests that fail with the fused layers only."""
    versions, tests = result["versions"], result["tests"]
    lines = ["| seed | layers | passed | failed | skipped | fused forwards |", "|---|---|---|---|---|---|"]
    for row in result["runs"]:
        cells = [row["seed"], {"peft": "PEFT's", "fused": "fused"}[row["side"]]]
        cells += [f"{row[name]:,}" for name in ("passed", "failed", "skipped", "fused_forwards")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    notes = [
        f"{kind}: `{test.rpartition('::')[2]}`, of {rerun['seeds']} seeds PEFT's own layers fail {rerun['failed']['peft']} and the "
        f"fused ones {rerun['failed']['fused']}, in float64 {rerun['failed_float64']['peft']} and {rerun['failed_float64']['fused']}."
        for kind, of_kind in (("Decided by rounding", result["rounding"]), ("Worse", result["worse"]))
        for test, rerun in of_kind.items()
    ]
    where = f"{result['hardware']['cpu']}; torch {versions['torch']}, peft {versions['peft']}; PEFT's tests at {tests['commit'][:9]} of "
    return "\n".join(
        [*lines, "", *notes, f"{where}{tests['date']}; commit {result['commit'][:9]}. `{result['command']}`"]
    )
