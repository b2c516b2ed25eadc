"""The cases.py of the ops: the programs find a new op there, and nothing in bench/ names it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peftlab_kernels
import pytest
from peftlab_kernels.cases import case_files, cases_of, gathered

from bench import compile_kernels
from bench.gpu_check import claims
from bench.gpu_check.base import Device
from bench.gpu_check.sections import SECTIONS, sections_of_ops, tasks_of

ROOT = Path(__file__).resolve().parents[3]
PLANTED = """
import torch
from peftlab_kernels.cases import Check, Compared, Compiled, Timing
from peftlab_kernels.nf4_dequant import cases as nf4

COMPILED = [Compiled("doubled_kernel", "", "*T *T i32", lambda dtype, rank: {"BLOCK": 64}, matrix=False)]
CLAIMS = [{"id": "doubled", "part": "correctness", "what": "it doubles", "rules": [{"section": "doubled", "match": {}}]}]
FACTOR = 2

def checks(device):
    def compare(shape):
        x = device.randn(*shape, seed=0, dtype=torch.float16)
        return Compared({"y": FACTOR * x}, {"y": x + x}, {"y": 2 * x.double()}, terms=1)
    yield Check({"check": "doubled"}, [(3, 5), (1, 1)], compare, "M, N")

def times(device):
    x = device.randn(8, 8, seed=0)
    yield Timing({"case": "doubled"}, lambda: ({"peftlab": lambda: 2 * x, "eager": lambda: x + x}, {"size": 64}), ("eager", "peftlab"))
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A new op with everything in its cases.py."""
    (tmp_path / "doubled").mkdir()
    (tmp_path / "doubled" / "__init__.py").write_text("")
    (tmp_path / "doubled" / "cases.py").write_text(PLANTED)
    monkeypatch.setattr(peftlab_kernels, "__path__", [*peftlab_kernels.__path__, str(tmp_path)])
    yield cases_of("doubled")
    for name in ("peftlab_kernels.doubled.cases", "peftlab_kernels.doubled"):
        del sys.modules[name]


def test_cases_exist_for_every_op_with_a_kernel() -> None:
    kernels = {path.parent.name for path in (ROOT / "kernels" / "peftlab_kernels").glob("*/kernel.py")}
    assert kernels == case_files().keys() == gathered("COMPILED").keys()


def test_new_op_gets_rows_and_compilations(planted: Any) -> None:
    checked, timed = sections_of_ops()
    assert (checked.name, timed.name, timed.stands_on) == ("doubled", "doubled speed", ("doubled",))
    device = Device("cpu")
    (check,), (timing,) = list(tasks_of(checked, device)), list(tasks_of(timed, device))
    checked_row = check.run()
    assert (checked_row["ok"], checked_row["shapes"], checked_row["worst_by_limit"], checked_row["bad"]) == (
        True,
        2,
        0.0,
        [],
    )
    row = timing.run()
    assert row["us"].keys() == {"peftlab", "eager"} and row["ratio"]["value"] > 0 and row["size"] == 64
    assert [way.kernel for op, way in compile_kernels.ways() if op == "doubled"] == ["doubled_kernel"]
    assert [claim["id"] for claim in claims.load()][-1:] == ["doubled"]


def test_new_op_with_a_fault_is_red(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "FACTOR", 2.01)
    (check,) = tasks_of(sections_of_ops()[0], Device("cpu"))
    row = check.run()
    assert row["ok"] is False and row["bad"][0]["where"].endswith("of y")


def test_sections_of_ops_leave_out_ops_of_the_schedule() -> None:
    assert sections_of_ops() == []
    assert {"order of addition", "lora_linear bfloat16"} < {section.name for section in SECTIONS}
