"""Joules from counters of a fake machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftlab.measuring.energy import EnergyMeter, find_meter


def counter(folder: Path, name: str, microjoules: int) -> None:
    (folder / name).mkdir()
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text("5000000\n")


def test_meter_adds_the_counters_of_all_processors(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 1_500_000)
    counter(tmp_path, "intel-rapl:0:0", 900_000)  # its cores, which the processor's counter includes
    counter(tmp_path, "intel-rapl:1", 500_000)
    meter, source = find_meter("cpu", rapl=tmp_path)
    assert meter is not None and source.startswith("RAPL")
    assert meter.read() == pytest.approx(2.0)


def test_meter_handles_a_counter_that_wraps(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 4_000_000)
    meter, _ = find_meter("cpu", rapl=tmp_path)
    assert meter is not None
    assert meter.between(4.0, 4.5) == pytest.approx(0.5)
    assert meter.between(4.0, 1.0) == pytest.approx(2.0), "5 J is where it wraps"
    assert EnergyMeter("", lambda: 0.0).between(4.0, 1.0) == -3.0


def test_find_meter_says_why_there_is_none(tmp_path: Path) -> None:
    meter, reason = find_meter("cpu", rapl=tmp_path)
    assert meter is None and "no energy counter of the processor" in reason
