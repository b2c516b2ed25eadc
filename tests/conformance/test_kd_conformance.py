"""kd_conformance.py on peftlab itself, and that its cases notice what they are there for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Each fault replaces a function of the contract; the cases named have to fail, and the exit code has to say so.
FAULTS = {
    "import peftlab.distillation.losses as m; f = m.token_divergence; "
    "m.token_divergence = lambda s, t, **kw: f(t, s, **kw)": ["forward KL", "first and last token"],
    "import peftlab.distillation.losses as m; f = m.token_divergence; "
    "m.token_divergence = lambda s, t, **kw: f(s, t, **{**kw, 'temperature': 1.0})": ["temperature"],
    "import peftlab.distillation as m; m.select = lambda v, trained: v[:, 1:][trained[:, 1:]]": [
        "first and last token"
    ],
    "import contextlib, peftlab.distillation as m; m.as_teacher = lambda t: contextlib.nullcontext()": [
        "teacher left in train mode"
    ],
    "import peftlab.distillation as m; m.num_targets = lambda trained: trained.numel()": ["padding", "accumulation"],
    "import peftlab.distillation.objective as m; f = m.ops.OnlineTeacher; "
    "m.ops.OnlineTeacher = lambda hidden, head: f(hidden.roll(1, 0), head)": ["first and last token"],
    "import peftlab.distillation.losses as m; m._rest = lambda z, s, t: z.sum(-1) * 0": [
        "top-k with tail",
        "tail below 6e-8",
    ],
}


def run(before: str = "") -> tuple[int, dict[str, str]]:
    """Exit code, and what both paths of peftlab get in each case."""
    code = f"import sys; {before}\nfrom tests.conformance import kd_conformance; sys.exit(kd_conformance.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--only", "peftlab", "peftlab fused", "--no-write"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows, done.stderr
    return done.returncode, {row[0].split(":")[0]: ", ".join(row[1:]) for row in rows[1:]}


def test_peftlab_passes_every_case() -> None:
    code, cells = run()
    assert code == 0, cells
    assert all(cell.count("pass") == 2 for name, cell in cells.items() if not name.startswith("**"))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_cases_notice(fault: str) -> None:
    code, cells = run(fault)
    assert code == 6
    for name in FAULTS[fault]:
        assert "fail" in cells[name], cells
