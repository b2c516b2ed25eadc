"""The lines that ``peftlab distill`` prints about the phases of an on-policy run."""

from __future__ import annotations

from typing import Any

from peftlab.cli.distill import phase_lines

PHASE: dict[str, Any] = {
    "phase": 1,
    "rows": 1200,
    "written": 900,
    "empty": 3,
    "mean_answer_tokens": 23.456,
    "ended": 0.875,
    "kl": 0.34567,
    "seconds": {"generating": 61.2, "scoring": 9.0, "training": 1234.0},
}


def test_phase_lines_has_one_line_per_phase() -> None:
    first, second, blank = phase_lines(
        {"on_policy": [{"seed": 0, "phases": [PHASE, {**PHASE, "phase": 2, "empty": 0}]}]}
    )
    assert first == (
        "phase 1: 900 of 1,200 rows written by the student (3 empty), 23.5 tokens each, 88 % ended; KL to the teacher "
        "0.3457 nats per token; generating 61 s, scoring 9 s, training 1,234 s"
    )
    assert second.startswith("phase 2: 900 of 1,200 rows written by the student, 23.5") and blank == ""


def test_phase_lines_names_the_seed_and_is_empty_for_other_runs() -> None:
    lines = list(phase_lines({"on_policy": [{"seed": s, "phases": [PHASE]} for s in (0, 1)]}))
    assert [line.partition(":")[0] for line in lines[:2]] == ["phase 1 of seed 0", "phase 1 of seed 1"]
    assert list(phase_lines({"card": {}})) == []
