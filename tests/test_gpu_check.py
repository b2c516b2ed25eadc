"""bench/gpu_check.py on a machine without a GPU: its dry run executes what needs no CUDA, so that a typo is not found there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def check(out: Path, *arguments: str) -> tuple[int, list[Row], str]:
    """Exit code, rows and what was said."""
    command = [sys.executable, "bench/gpu_check.py", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    rows = out / "gpu_check.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    return done.returncode, [json.loads(line) for line in lines], done.stderr


def sections() -> list[str]:
    code = (
        "import sys; sys.path.insert(0, 'bench'); import gpu_check\n"
        "print(*(s.name for s in gpu_check.SECTIONS if not s.asked), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked(tmp_path: Path) -> None:
    code, rows, said = check(tmp_path)
    assert code == 2
    assert not rows
    assert "needs a CUDA device" in said


def test_a_few_sections_dry(tmp_path: Path) -> None:
    names = ["dequant", "linear losses", "tests", "ceilings", "order of addition"]
    code, rows, said = check(tmp_path, "--dry-run-cpu", "--only", *names)
    assert code == 0, said
    assert {row["section"] for row in rows} == set(names)
    assert all(row["ok"] is True and row["device"] and row["versions"] for row in rows)
    assert "rows green, 0 red, 0 not run" in said


def test_distillation_dry(tmp_path: Path) -> None:
    code, rows, said = check(tmp_path, "--dry-run-cpu", "--only", "distillation", "distillation steps")
    assert code == 0, said
    assert {row["section"] for row in rows} == {"distillation", "distillation steps", "gate"}
    # What was planned of a step's memory stands next to what was measured.
    steps = [row for row in rows if "plan_bytes" in row]
    assert len(steps) == 4 and all(row["plan_bytes"]["peak"] > row["plan_bytes"]["loss"] > 0 for row in steps)
    assert said.count("planned") == 4


def test_what_takes_minutes_runs_only_when_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, argparse; sys.path.insert(0, 'bench'); import gpu_check as g; p = argparse.ArgumentParser()\n"
        "for only in ([], ['healing']):\n"
        "    o = argparse.Namespace(only=only, skip=[], dry_run_cpu=False)\n"
        "    print(*(s.name for s in g.chosen_sections(o, p)), sep=',')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    usual, asked = done.stdout.splitlines()
    assert "healing" not in usual.split(",") and "distillation steps" in usual.split(",")
    assert asked == "healing"


@pytest.mark.slow
def test_every_section_dry(tmp_path: Path) -> None:
    code, rows, said = check(tmp_path, "--dry-run-cpu")
    assert code == 0, said
    assert {row["section"] for row in rows} == set(sections())
    assert not [row for row in rows if row["ok"] is None and "not installed" not in row["not_run"]]
    compared = [row for row in rows if row.get("case") == "lora_linear"]
    assert compared and all(row["ratio"]["both"]["ratio"] > 0 for row in compared)


def test_unproven_kernels_are_not_timed(tmp_path: Path) -> None:
    """A section of correctness that finds no time is red, and then nothing is timed."""
    code, rows, _ = check(tmp_path, "--dry-run-cpu", "--minutes", "0.05", "--only", "dequant", "ceilings")
    assert code == 6
    assert [(row["section"], row["ok"]) for row in rows] == [("dequant", False), ("ceilings", None)]


FAULTS = """
import sys, json, time
sys.path[:0] = ["bench", "kernels"]
import gpu_check
from pathlib import Path
from _gpu_base import Deadline, Device
from peftlab_kernels import lora_linear, nf4_dequant
right, dequant = lora_linear.lora_linear, nf4_dequant.nf4_dequant
lora_linear.lora_linear = lambda *args, scale, **kwargs: right(*args, scale=1.01 * scale, **kwargs)
nf4_dequant.nf4_dequant = lambda *args, **kwargs: dequant(*args, **kwargs) * 1.01
from peftlab import ops
kl = ops.linear_kl
ops.linear_kl = lambda *args, **kwargs: (found := kl(*args, **kwargs))._replace(total=1.05 * found.total)
chosen = [s for s in gpu_check.SECTIONS if s.name in ("dequant", "lora_linear float16", "distillation")]
gpu_check.run_group(chosen, gpu_check.Rows(Path(sys.argv[1]), Device("cpu")), Deadline(time.time() + 200))
"""


def test_deliberate_faults_are_red(tmp_path: Path) -> None:
    """A scale and weights that are 1 % off, a divergence that is 5 % off."""
    path = tmp_path / "rows.jsonl"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", FAULTS, str(path)], cwd=ROOT, env=environment, check=True)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    red = {(row["check"], row["ok"]) for row in rows}
    assert (
        ("lora_linear", True) not in red
        and ("nf4_dequant", True) not in red
        and ("nf4_dequant, merge", True) not in red
        and ("distillation loss", True) not in red
    )
    assert ("int8_dequant", True) in red
    assert ("latency waits for the device", True) in red
