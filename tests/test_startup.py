"""`peftlab --help` and `peftlab recipes` answer at once: they import neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "peftlab"
BOUND_S = 0.5
# On a slow machine the bound is a multiple of what the command line's libraries alone take.
BOUND_TIMES = 2.5
LIBRARIES = "import typer, typer._adapters, rich.table; print(1)"
# The minimum of several runs measures the command. A mean or a median would also measure the load of the machine.
NUM_RUNS = 7
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "bitsandbytes", "sklearn", "triton"}


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    assert COMMAND.exists(), f"{COMMAND} is missing: install the project with `pip install -e .`"
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("argument", ["--help", "recipes"])
def test_command_line_answers_within_half_a_second(argument: str) -> None:
    seconds: list[float] = []
    libraries: list[float] = []
    for _ in range(NUM_RUNS):
        for times, command in ((seconds, (COMMAND, argument)), (libraries, (sys.executable, "-c", LIBRARIES))):
            start = time.perf_counter()
            assert _run(*command).stdout
            times.append(time.perf_counter() - start)
        bound = max(BOUND_S, BOUND_TIMES * min(libraries))
        if min(seconds) < bound:
            return
    pytest.fail(
        f"peftlab {argument}: {min(seconds):.2f} s at best of {NUM_RUNS} runs, at most {bound:.2f} s are allowed"
    )


@pytest.mark.parametrize("argument", ["--help", "recipes"])
def test_command_line_imports_nothing_heavy(argument: str) -> None:
    report = _run(sys.executable, "-X", "importtime", COMMAND, argument).stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in report.splitlines() if "|" in line}
    assert "peftlab" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("verb", ["check", "train", "teach", "distill"])
def test_command_line_reports_a_misspelt_key_before_heavy_imports(verb: str) -> None:
    command = (sys.executable, "-X", "importtime", COMMAND, verb, "smoke", "train.epoch=2")
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    assert done.returncode == 2
    assert "train.epoch: unknown key; did you mean `epochs`?" in done.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "peftlab" in imported and not imported & HEAVY


def test_bitsandbytes_imports_no_compiler_until_it_is_used() -> None:
    """Its decorators alone would import Inductor. What they decorate still compiles, or falls back, at its first call."""
    program = """
import sys, torch
compiler = torch.compile
from peftlab.models import import_bitsandbytes
bnb = import_bitsandbytes()
assert torch.compile is compiler and import_bitsandbytes() is bnb
assert "torch._inductor.compile_fx" not in sys.modules
weight = torch.randn(64, 64)
packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
print(float((bnb.functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()))
"""
    assert 0.05 < float(_run(sys.executable, "-c", program).stdout) < 0.15
