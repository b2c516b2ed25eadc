"""The ceilings of the machine: how often each is measured, and which measurements count."""

from __future__ import annotations

import pytest

from peftlab.measuring import ceilings


class Clock:
    """A clock that advances only in ``work``: by ``durations``, the last one repeated."""

    def __init__(self, *durations: float) -> None:
        self.now, self.calls, self.durations = 0.0, 0, durations

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self.durations[min(self.calls, len(self.durations) - 1)]
        self.calls += 1


@pytest.mark.parametrize(
    ("durations", "calls", "counted"),
    [
        ((0.4, 0.2, 0.01), 11, [0.01] * 9),  # threads and libraries start in the first two, which do not count
        ((3.5,), 1, [3.5]),  # a product in bfloat16 without units for it
        ((1.0,), 3, [1.0]),
    ],
)
def test_seconds_counts_the_tries_after_warm_up(
    monkeypatch: pytest.MonkeyPatch, durations: tuple[float, ...], calls: int, counted: list[float]
) -> None:
    clock = Clock(*durations)
    monkeypatch.setattr(ceilings, "time", clock)
    assert ceilings._seconds(clock.work, "cpu") == pytest.approx(counted)
    assert clock.calls == calls
