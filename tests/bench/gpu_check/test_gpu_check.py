"""bench/gpu_check on a machine without a GPU. Its dry run executes everything that needs no CUDA, so typos are found
here."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check.__main__ import chosen_sections
from bench.gpu_check.sections import SECTIONS
from peftlab.measuring.journal import read_records
from tests.processes import Processes

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]
ARGUMENTS = argparse.ArgumentParser()


Result = tuple[int, list[Row], str]


def check(out: Path, *arguments: str) -> Result:
    """Exit code, rows and stderr of gpu_check as users start it."""
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, rows_of(out / "gpu_check.jsonl"), done.stderr


@pytest.fixture
def checked(process: Processes) -> Callable[..., Result]:
    """``check``, whose processes are forks. tests/bench/gpu_check/forked.py"""

    def run(out: Path, *arguments: str) -> Result:
        code = "from tests.bench.gpu_check.forked import run; run()"
        done = process.run(["-c", code, "--out", str(out), *arguments], cwd=ROOT, timeout=300)
        return done.returncode, rows_of(out / "gpu_check.jsonl"), done.stderr

    return run


def rows_of(path: Path) -> list[Row]:
    return [record for record in read_records(path) if record["kind"] == "row"] if path.exists() else []


def figures_are_there(rows: list[Row]) -> None:
    """The dry rows contain each figure that decides a claim, with the keys that the claim asks for. Two sections have
    no rows here because packages are missing; tests/bench/peers/test_gpu_unsloth.py and test_gpu_losses.py check
    theirs."""
    claims = json.loads((ROOT / "bench" / "results" / "claims.json").read_text())
    seen = {row["section"] for row in rows}
    rules = [
        r
        for claim in claims
        for r in claim["rules"]
        if "figure" in r and r["section"] in seen - {"unsloth", "loss speed, compiled"}
    ]
    assert rules
    for rule in rules:
        of_section = [row for row in rows if row["section"] == rule["section"] and "task" in row]
        fitting = [row for row in of_section if rule["match"].keys() <= row["task"].keys()]
        assert any(rule["figure"][0] in row for row in fitting), rule


def sections() -> list[str]:
    return [section.name for section in SECTIONS if not section.only_by_name]


def test_copied_tree_runs_its_own_code(tmp_path: Path) -> None:
    """The copy needs only an interpreter, even if another peftlab is installed in it."""
    for name in ("bench", "kernels", "peftlab"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    code = (
        "from bench.gpu_check import sections; import peftlab, peftlab_kernels\n"
        "print(sections.__file__, peftlab.__file__, peftlab_kernels.__file__, sep='\\n')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    preflight = ["-m", "bench.gpu_check", "--preflight", "--dry-run-cpu", "--out", str(tmp_path / "out")]
    imported, preflight_run = (
        subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        for words in (["-c", code], preflight)
    )
    assert [Path(line).is_relative_to(tmp_path) for line in imported.stdout.splitlines()] == [True] * 3
    assert "preflight: " in preflight_run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_checks_nothing(tmp_path: Path) -> None:
    code, rows, stderr = check(tmp_path)
    assert code == 2
    assert not rows
    assert "needs a CUDA device" in stderr


OPS = ("dequant", "ceilings", "dequant speed", "order of addition")


@pytest.mark.parametrize(
    "names", [OPS, pytest.param((*OPS, "linear losses", "tests", "loss speed"), marks=pytest.mark.slow)]
)
def test_dry_run_of_a_few_sections_is_green(tmp_path: Path, names: tuple[str, ...]) -> None:
    code, rows, stderr = check(tmp_path, "--dry-run-cpu", "--only", *names)
    assert code == 0, stderr
    assert {row["section"] for row in rows} == set(names)
    assert all(row["ok"] is True and row["task"] and row["seconds"] >= 0 for row in rows)
    assert "rows green, 0 red, 0 not run" in stderr
    figures_are_there(rows)
    header, *records = read_records(tmp_path / "gpu_check.jsonl")
    assert header["kind"] == "header" and header["dry_run"] is True
    assert header["machine"]["name"] and header["machine"]["cores"] and header["versions"]["torch"] and header["source"]
    assert header["command"].startswith(
        "python -m bench.gpu_check --dry-run-cpu --only dequant ceilings 'dequant speed'"
    )
    assert str(tmp_path) not in json.dumps(header)
    listed = {r["section"]: r["tasks"] for r in records if r["kind"] == "begin"}
    for name in names:
        assert listed[name] == [row["task"] for row in rows if row["section"] == name]


def test_resume_continues_a_killed_run(checked: Callable[..., Result], tmp_path: Path) -> None:
    """The run resumes after a kill in the middle of a line. It refuses another version. It does nothing if everything
    is done."""
    path, chosen = tmp_path / "gpu_check.jsonl", ("--dry-run-cpu", "--only", "order of addition", "ceilings")

    def measured() -> list[Row]:
        return [row for row in rows_of(path) if "task" in row]

    code, _, stderr = checked(tmp_path, *chosen, "--resume")
    assert code == 2 and "no benchmark in" in stderr
    code, _, stderr = checked(tmp_path, *chosen)
    assert code == 0, stderr
    first, lines = measured(), path.read_bytes().splitlines(keepends=True)
    (lost,) = (n for n, line in enumerate(lines) if b'"ceiling, copy"}, "ok"' in line)
    path.write_bytes(b"".join([*lines[:lost], *lines[lost + 1 :]]) + lines[lost][:40])
    code, _, stderr = checked(tmp_path, *chosen, "--resume")
    assert code == 0 and "already measured: order of addition" in stderr, stderr
    *kept, again = measured()
    assert again["task"] == {"case": "ceiling, copy"}
    assert kept == [row for row in first if row["task"] != again["task"]]
    num_before = len(read_records(path))
    code, _, stderr = checked(tmp_path, *chosen, "--resume")
    assert code == 0 and "already measured: ceilings, order of addition" in stderr
    assert [r["kind"] for r in read_records(path)[num_before:]] == ["resumed"]

    header, rest = path.read_text().split("\n", 1)
    changed = json.loads(header)
    changed["versions"]["torch"], changed["commit"] = "1.0", "0" * 40
    path.write_text(json.dumps(changed) + "\n" + rest)
    code, _, stderr = checked(tmp_path, *chosen, "--resume")
    assert code == 5 and len(measured()) == len(first)
    assert (
        'versions.torch: "1.0" there' in stderr
        and "commit: " in stderr
        and "resume with the original settings" in stderr
    )


def test_report_refuses_a_dry_run(checked: Callable[..., Result], tmp_path: Path) -> None:
    files = [ROOT / "bench" / name for name in ("RESULTS.md", "results/PENDING.md")]
    before = [file.read_bytes() for file in files]
    code, rows, stderr = checked(tmp_path, "--dry-run-cpu", "--only", "ceilings")
    assert code == 0 and {row["ok"] for row in rows} == {True}, stderr
    code, _, stderr = checked(tmp_path, "--report")
    assert code == 2 and "is from a dry run, which confirms nothing" in stderr
    code, rows, stderr = checked(ROOT / "bench" / "results", "--dry-run-cpu", "--only", "ceilings")
    assert code == 2 and "a dry run does not write into the folder of GPU rows" in stderr
    assert [file.read_bytes() for file in files] == before


@pytest.mark.slow
def test_dry_run_of_distillation_steps_plans_memory(tmp_path: Path) -> None:
    code, rows, stderr = check(tmp_path, "--dry-run-cpu", "--only", "distillation steps")
    assert code == 0, stderr
    gates = {"dequant", "lora_linear bfloat16", "linear losses", "distillation"}
    assert {row["section"] for row in rows} == {"distillation steps", *gates}
    # The planned memory of a step is printed next to the measured one.
    steps = [row for row in rows if "plan_bytes" in row]
    assert len(steps) == 4 and all(row["plan_bytes"]["peak"] > row["plan_bytes"]["loss"] > 0 for row in steps)
    assert stderr.count("planned") == 4
    figures_are_there(rows)


def test_section_healing_runs_only_when_asked_for() -> None:
    usual, asked = (
        [
            s.name
            for s in chosen_sections(argparse.Namespace(only=only, skip=[], dry_run_cpu=False, child=None), ARGUMENTS)
        ]
        for only in ([], ["healing"])
    )
    assert "healing" not in usual and "distillation steps" in usual
    assert asked == ["linear losses", "distillation", "healing"], "what it stands on comes along"


@pytest.mark.slow
def test_dry_run_of_every_section_is_green(tmp_path: Path) -> None:
    code, rows, stderr = check(tmp_path, "--dry-run-cpu")
    assert code == 0, stderr
    assert {row["section"] for row in rows} == set(sections())
    assert not [row for row in rows if row["ok"] is None and "not installed" not in row["not_run"]]
    compared = [row for row in rows if row.get("task", {}).get("case") == "lora_linear"]
    assert compared and all(row["ratio"]["both"]["value"] > 0 for row in compared)
    figures_are_there(rows)


def test_kernels_with_unfinished_checks_are_not_timed(checked: Callable[..., Result], tmp_path: Path) -> None:
    """A check that found no time, or was skipped, keeps its timings from running. The row says so."""
    code, rows, stderr = checked(tmp_path, "--dry-run-cpu", "--minutes", "0", "--only", "dequant speed")
    assert code == 0, stderr
    assert {(row["section"], row["ok"], row["not_run"]) for row in rows} == {
        ("dequant", None, "no time is left"),
        ("dequant speed", None, "not timed: `dequant` is unfinished (no time is left)"),
    }
    code, rows, stderr = checked(tmp_path, "--dry-run-cpu", "--only", "dequant speed", "ceilings", "--skip", "dequant")
    assert code == 0, stderr
    (row,) = (row for row in rows if row["ok"] is not True)
    assert row["section"] == "dequant speed" and row["not_run"] == "not timed: `dequant` has not run"
    assert [row["section"] for row in rows].count("ceilings") == 2


# gpu_check with other sources for its sections, in this process and in its forks. Each section of
# correctness gives green rows, and the section named by $SPOILT one red row. The sections of timing in $REAL stay as
# they are; the others give green rows.
DRIVER = """
import os, sys
from dataclasses import replace
sys.modules["driver"] = sys.modules["__main__"]
from bench.gpu_check import sections
from bench.gpu_check.base import Task
from tests.bench.gpu_check.forked import run

def rows(device, name):
    bad = {"ok": False, "failed": "planted"} if name == os.environ["SPOILT"] else {}
    yield Task({"case": name}, dict)
    yield Task({"case": name, "planted": True}, lambda: bad)

for place, section in enumerate(sections.SECTIONS):
    if section.name not in os.environ["REAL"].split(","):
        sections.SECTIONS[place] = replace(section, source=f"driver:rows:{section.name}", needs=(), uses=())
run()
"""
CORRECTNESS = [section.name for section in SECTIONS if not section.timing]
CHEAP = "ceilings,order of addition"


def driven(process: Processes, out: Path, spoilt: str, real: str) -> Result:
    environment = {**os.environ, "SPOILT": spoilt, "REAL": real}
    done = process.run(["-c", DRIVER, "--dry-run-cpu", "--out", out], cwd=ROOT, env=environment, timeout=300)
    return done.returncode, rows_of(out / "gpu_check.jsonl"), done.stderr


@pytest.mark.parametrize(
    ("spoilt", "real"),
    [
        ("linear losses", CHEAP),
        pytest.param("tests", CHEAP + ",loss speed,dequant speed", marks=pytest.mark.slow),
        *(
            pytest.param(name, CHEAP, marks=pytest.mark.slow)
            for name in CORRECTNESS
            if name not in ("linear losses", "tests")
        ),
    ],
)
def test_red_row_stops_only_the_timings_that_depend_on_it(
    process: Processes, tmp_path: Path, spoilt: str, real: str
) -> None:
    """The sections run in their own processes. tests/bench/gpu_check/test_gpu_schedule.py has all cases without
    processes."""
    code, rows, stderr = driven(process, tmp_path, spoilt, real)
    assert code == 6, stderr
    assert "planted" in stderr
    stands_on = standing()
    assert stands_on.keys() == {row["section"] for row in rows if row["section"] not in CORRECTNESS}
    for name, gates in stands_on.items():
        states = [row["ok"] for row in rows if row["section"] == name]
        if spoilt in gates:
            (row,) = (row for row in rows if row["section"] == name)
            assert row["not_run"] == f"not timed: `{spoilt}` has 1 red row (planted)"
        else:
            assert states and set(states) == {True}, name


def standing() -> dict[str, list[str]]:
    """For each usual section of timing, the sections that it depends on."""
    return {
        section.name: list(section.stands_on) for section in SECTIONS if section.timing and not section.only_by_name
    }


FAULTS = """
import sys, json, time
from pathlib import Path
from bench.gpu_check.base import Deadline, Device
from bench.gpu_check.run import Rows, run_group
from bench.gpu_check.sections import SECTIONS
from peftlab.measuring.journal import begin
from peftlab_kernels.lora_linear import cases as linear
from peftlab_kernels.nf4_dequant import cases as nf4
right, dequant = linear.lora_linear, nf4.nf4_dequant
linear.lora_linear = lambda *args, scale, **kwargs: right(*args, scale=1.01 * scale, **kwargs)
nf4.nf4_dequant = lambda *args, **kwargs: dequant(*args, **kwargs) * 1.01
from peftlab import ops
kl = ops.linear_kl
ops.linear_kl = lambda *args, **kwargs: (found := kl(*args, **kwargs))._replace(total=1.05 * found.total)
chosen = [s for s in SECTIONS if s.name in ("dequant", "lora_linear float16", "distillation")]
journal = begin(Path(sys.argv[1]), {})
run_group(chosen, Rows(journal, Device("cpu")), Deadline(time.time() + 200))
"""


def test_checks_find_deliberate_faults(process: Processes, tmp_path: Path) -> None:
    """The faults: a scale and weights that are 1 % off, a divergence that is 5 % off."""
    path = tmp_path / "rows.jsonl"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process.run(["-c", FAULTS, path], cwd=ROOT, env=environment, timeout=300, check=True)
    red = {(row["task"]["check"], row["ok"]) for row in rows_of(path)}
    assert (
        ("lora_linear", True) not in red
        and ("nf4_dequant", True) not in red
        and ("nf4_dequant, merge", True) not in red
        and ("distillation loss", True) not in red
    )
    assert ("int8_dequant", True) in red
    assert ("latency waits for the device", True) in red
