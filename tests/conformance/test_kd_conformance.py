"""The loss contract of distillation: peftlab keeps it, its cases notice faults, and other projects' losses are recorded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import peftlab.distillation
from bench import RESULTS, ROOT, records, tables
from peftlab import ops
from peftlab.distillation import losses
from tests.conformance.kd_conformance import ALL_CASES, measure, measure_all, quiet, table
from tests.conformance.kd_systems import SYSTEMS

RECORDED, PAGE = RESULTS / "kd_conformance.json", ROOT / "bench" / "RESULTS.md"
BY_NAME = {system.name: system for system in SYSTEMS}
OURS = [system for system in SYSTEMS if system.name.startswith("peftlab")]
PEERS = [system for system in SYSTEMS if system not in OURS]
divergence, teacher_head = losses.token_divergence, ops.OnlineTeacher
# Each fault replaces a function of the contract: (module, function, replacement, cases that must fail on one of our paths).
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], list[str]]] = {
    "student and teacher change places": (
        losses,
        "token_divergence",
        lambda s, t, **settings: divergence(t, s, **settings),
        ["forward KL", "first and last token"],
    ),
    "no temperature": (
        losses,
        "token_divergence",
        lambda s, t, **settings: divergence(s, t, **{**settings, "temperature": 1.0}),
        ["temperature"],
    ),
    "labels are not shifted": (
        peftlab.distillation,
        "select",
        lambda values, trained: values[:, 1:][trained[:, 1:]],
        ["first and last token"],
    ),
    "the teacher keeps its dropout": (
        peftlab.distillation,
        "as_teacher",
        lambda teacher: contextlib.nullcontext(),
        ["teacher left in train mode"],
    ),
    "padding counts": (
        peftlab.distillation,
        "num_targets",
        lambda trained: trained.numel(),
        ["padding", "accumulation"],
    ),
    "the teacher is a token behind": (
        ops,
        "OnlineTeacher",
        lambda hidden, head: teacher_head(hidden.roll(1, 0), head),
        ["first and last token"],
    ),
    "the rest of the classes has no mass": (
        losses,
        "_rest",
        lambda z, s, t: z.sum(-1) * 0,
        ["top-k with tail", "tail below 6e-8"],
    ),
}


@pytest.mark.parametrize("system", OURS, ids=lambda system: system.name)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_peftlab_losses_pass_every_case(system: Any, case: Any) -> None:
    result = measure(system, case)
    assert result["outcome"] == "pass", result


@pytest.mark.parametrize("fault", FAULTS)
def test_kd_cases_notice_the_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, replacement, noticed = FAULTS[fault]
    monkeypatch.setattr(module, name, replacement)
    for case in (case for case in ALL_CASES if case.name in noticed):
        assert "fail" in {measure(system, case)["outcome"] for system in OURS}, case.name


@cache
def version_of(name: str) -> str | None:
    with quiet():
        return BY_NAME[name].version()


@cache
def results_of(name: str) -> dict[str, dict[str, Any]]:
    return measure_all(BY_NAME[name])


@pytest.mark.peers
@pytest.mark.parametrize("name", [system.name for system in PEERS])
def test_peer_gives_the_recorded_outcomes(name: str, write_results: bool) -> None:
    """A failed case is a difference from our contract, not a fault of the peer. The test asserts that it is still there."""
    version, recorded = version_of(name), json.loads(RECORDED.read_text(encoding="utf-8"))
    if version is None:
        pytest.skip(f"{name} is not installed")
    outcomes = {case: result["outcome"] for case, result in results_of(name).items()}
    if write_results or recorded["systems"].get(name) != version:
        pytest.skip(f"{name} {version} has no outcomes recorded yet: {outcomes}")
    assert outcomes == {case: result["outcome"] for case, result in recorded["results"][name].items()}


@pytest.mark.peers
def test_kd_conformance_results_are_written(write_results: bool) -> None:
    if not write_results:
        pytest.skip("--write-results writes bench/results/kd_conformance.json and its table")
    versions = {name: version_of(name) for name in BY_NAME}
    results = {name: results_of(name) for name, version in versions.items() if version}
    record = records.provenance("make conformance ARGS=--write-results")
    records.write_json(RECORDED, {"systems": versions, "results": results, **record})
    tables.replace_section(PAGE, "kd_conformance", table(versions, results))


def test_kd_conformance_table_matches_its_results() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    made = table(recorded["systems"], recorded["results"])
    assert made == tables.section(PAGE.read_text(encoding="utf-8"), "kd_conformance")
