"""Interleaved timing on a simulated clock, so that no figure depends on the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peftlab.measuring import latency
from peftlab.measuring.intervals import ratio_of_medians
from peftlab.measuring.latency import Latency, measure_latency


class Clock:
    """A clock that advances only during the calls of its runs; ``calls`` is their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, [""][:0]
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def run(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds()

        return call


def test_latency_figures_equal_those_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow, fast = iter([9.0, 9.0, 0.2, 0.3, 0.4, 0.5, 0.6]), iter([9.0, 9.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    runs = {"teacher": clock.run("teacher", lambda: next(slow)), "student": clock.run("student", lambda: next(fast))}
    latencies = measure_latency(runs, num_tokens=1000, repeats=5, seconds=1000)
    assert latencies["teacher"] == Latency(
        *(pytest.approx(x) for x in (400, 300, 500)), 5, pytest.approx(2500), 1.0, None, None
    )
    assert (latencies["student"].median_ms, latencies["student"].tokens_per_s) == pytest.approx((200, 5000))
    assert latencies["student"].speed == pytest.approx(2.0)
    assert latencies["student"].costs()["speed"]["n"] == 5
    assert clock.calls[:4] == ["teacher", "student"] * 2


def test_rounds_measure_every_model_in_a_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measure_latency({name: clock.run(name, lambda: 0.001) for name in "abc"}, warmup=0, repeats=40)
    rounds = [tuple(clock.calls[i : i + 3]) for i in range(0, 120, 3)]
    assert {frozenset(r) for r in rounds} == {frozenset("abc")} and len(set(rounds)) == 6


def test_drift_of_the_machine_cancels_only_when_models_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault: all rounds of one model run before all of the other, while the machine gets slower."""
    clock = Clock(monkeypatch)

    def drifting() -> float:
        return 0.1 * (1 + clock.now / 10)

    runs = {name: clock.run(name, drifting) for name in ("teacher", "student")}
    turns = measure_latency(runs, warmup=0, repeats=40, seconds=1e9)
    assert turns["student"].speed == pytest.approx(1.0, abs=0.03)
    clock.now = 0.0
    apart = [measure_latency({name: run}, warmup=0, repeats=40, seconds=1e9)[name] for name, run in runs.items()]
    assert apart[0].median_ms / apart[1].median_ms < 0.8


def test_measure_latency_bounds_time_but_takes_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    latencies = measure_latency(
        {"a": clock.run("a", lambda: 1.0), "b": clock.run("b", lambda: 0.5)}, warmup=2, seconds=20
    )
    # 3 s of warm-up, then rounds of 1.5 s: the twelfth would end at 21 s.
    assert latencies["a"].num_rounds == 11 and clock.now <= 20
    latencies = measure_latency({"a": clock.run("a", lambda: 1.0), "b": clock.run("b", lambda: 0.5)}, seconds=0.1)
    assert latencies["b"].num_rounds == 3 and latencies["b"].speed_low is None and latencies["b"].tokens_per_s is None


def test_ratio_of_medians_covers_in_95_of_100() -> None:
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drift = rng.lognormal(0, 0.1, 30)
        teacher, student = (x * drift * rng.lognormal(0, 0.1, 30) for x in (2.0, 1.0))
        ratio = ratio_of_medians(teacher.tolist(), student.tolist())
        low, high = ratio.low or 0.0, ratio.high or 0.0
        held += low <= 2.0 <= high
    assert 0.90 <= held / 200 <= 0.995


def test_measure_latency_on_the_real_clock() -> None:
    runs = {"large": lambda: time.sleep(0.02), "small": lambda: time.sleep(0.01)}
    latencies = measure_latency(runs, num_tokens=128, warmup=1, repeats=15, seconds=5)
    # A sleep is never too short. On a busy machine it is a little too long.
    assert 1.3 < latencies["small"].speed < 2.7 and latencies["large"].median_ms >= 20
    assert latencies["small"].low_ms <= latencies["small"].median_ms <= latencies["small"].high_ms


@pytest.mark.gpu
def test_measure_latency_waits_for_the_gpu() -> None:
    a = torch.randn(4096, 4096, device="cuda")

    def products(num: int) -> Callable[[], object]:
        return lambda: [a @ a for _ in range(num)]

    latencies = measure_latency({"large": products(40), "small": products(20)}, device="cuda", repeats=20, seconds=5)
    # Without waiting, both would take the time to queue them, far below that of 20 products of 137 GFLOP.
    assert 1.6 < latencies["small"].speed < 2.5
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        start.record()
        products(20)()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    assert latencies["small"].median_ms == pytest.approx(statistics.median(times), rel=0.25)


def test_measure_latency_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected runs, warmup >= 0 and repeats >= 3, found 0, 2, 50"):
        measure_latency({})
