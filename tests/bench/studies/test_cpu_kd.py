"""When bench/peers/distillation.py accepts two trainings as equal, and how it summarizes repetitions. The engines
themselves take minutes."""

from __future__ import annotations

from typing import Any

import pytest

from bench.peers import distillation

LOSSES = {"online": [5.0, 4.0, 3.0], "cached": [4.2, 3.4, 2.6], "gkd": [5.0, 4.0, 3.0], "distillation": [5.0, 4.0, 3.0]}


@pytest.mark.parametrize(
    ("engine", "losses", "passed"),
    [
        ("gkd", [5.0002, 4.002, 3.002], True),
        ("gkd", [5.001, 4.0, 3.0], False),  # another row, or another divisor
        ("distillation", [5.0, 4.0, 3.01], False),  # another update
        ("cached", [5.005, 4.0, 3.0], True),  # only the rounding of what is stored is lost
        ("cached", [5.02, 4.0, 3.0], False),  # coarser storage cannot differ by this much
        ("cached", [0.0, 0.0, 0.0], False),
        ("gkd", [float("nan"), 4.0, 3.0], False),
    ],
)
def test_gate_judges_losses_of_each_engine(engine: str, losses: list[float], passed: bool) -> None:
    assert distillation.judge({**LOSSES, engine: losses})["passed"] is passed
    assert distillation.judge(LOSSES)["passed"]


def rows(**seconds: list[float]) -> list[dict[str, Any]]:
    figures = {"rows": 8, "tokens": 100, "trained_tokens": 50, "padded_tokens": 120, "micro_batches": 2}
    figures |= {"training_peak_increase_bytes": 1, "before": {}, "after": {"loss": 3.0}}
    return [
        {**figures, "engine": e, "repetition": i, "seconds": s, "cpu_seconds": s / 2, "peak_rss_bytes": 1000 * s}
        for e, times in seconds.items()
        for i, s in enumerate(times)
    ]


def test_ratios_are_above_1_where_ours_is_faster() -> None:
    measured = rows(online=[2.0, 2.2], cached=[1.0, 1.1], gkd=[4.0, 4.4], distillation=[6.0, 6.6])
    ratios = distillation.summarize(measured)["ratios"]
    assert ratios["online against gkd"]["seconds"]["ratio"] == pytest.approx(2)
    assert ratios["online against distillation"]["peak_rss_bytes"]["ratio"] == pytest.approx(3)
    assert ratios["cached against online"]["cpu_seconds"]["ratio"] == pytest.approx(2)


def test_flops_predict_that_storing_the_teacher_saves_its_pass() -> None:
    predictions = {name: distillation.predicted(name, rows(online=[1.0])) for name in ("lora", "full")}
    # By hand for half of 30-layer SmolLM2's tokens scored: layers 3,538,944 and head 28,311,552 weights, 20 layers kept.
    teacher = 2 * (100 * 30 * 3_538_944 + 50 * 28_311_552)
    student = 2 * (100 * 20 * 3_538_944 + 50 * 28_311_552)
    assert predictions["full"]["online_over_cached"] == pytest.approx((teacher + 3 * student) / (3 * student))
    adapters = 6 * 100 * 20 * 8 * (2 * 1152 + 2 * 768 + 3 * 2112)
    assert predictions["lora"]["cached_flops"] == pytest.approx(2 * student + adapters)
