"""PEFT's own tests of LoRA with the fused layers. Small tests of ours check that the suite tells rounding from a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import RESULTS, ROOT, records, tables
from tests.conformance import peft_suite

RECORDED, PAGE = RESULTS / "peft_suite.json", ROOT / "bench" / "RESULTS.md"
# sum: adds in another order than both sides, with a tolerance below float32 rounding. faulty: fails with the fused layers
# only. of_two_seeds: passes with seed 0 and not with seed 1.
LORA_TESTS = """
import torch
from peft import LoraConfig, get_peft_model

def layer_and_input():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), LoraConfig(target_modules=["0"], lora_alpha=8))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer, torch.randn(8, 64)

def test_sum():
    layer, x = layer_and_input()
    low = x.flip(-1) @ layer.lora_A["default"].weight.t().flip(0) @ layer.lora_B["default"].weight.t()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + low, rtol=0, atol=1e-7)

def test_faulty():
    layer, x = layer_and_input()
    assert not type(layer).__name__.startswith("Fused")

def test_of_two_seeds():
    assert torch.rand(()) < 0.6
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_lora.py").write_text(LORA_TESTS)
    return tmp_path


@pytest.mark.parametrize(
    ("seeds", "peft", "fused", "float64", "rounding"),
    [
        (200, 6, 4, 0, True),
        (200, 6, 16, 0, True),  # 3 standard deviations are 14
        (200, 6, 40, 0, False),  # less accurate than PEFT
        (200, 0, 1, 0, False),  # PEFT's own layers always pass
        (200, 6, 4, 1, False),  # a fault in float64 as well
        (199, 6, 4, 0, False),  # not every run took place
    ],
)
def test_is_rounding_by_counts_of_failures(seeds: int, peft: int, fused: int, float64: int, rounding: bool) -> None:
    rerun = peft_suite.Again(seeds, {"peft": peft, "fused": fused}, {"peft": 0, "fused": float64}, {})
    assert rerun.is_rounding() is rounding


@pytest.mark.slow
def test_peft_suite_again_recognizes_rounding(checkout: Path) -> None:
    rerun = peft_suite.again(checkout, "tests/test_lora.py::test_sum")
    assert rerun.is_rounding() and rerun.failed["fused"] > 0, rerun
    assert 0 < rerun.error["fused"] < 1e-6 and 0 < rerun.error["peft"] < 1e-6


@pytest.mark.slow
def test_peft_suite_compare_reports_a_fault_as_worse(checkout: Path) -> None:
    result = peft_suite.compare(checkout, ["test_lora.py"], [0])
    assert result["worse"]["tests/test_lora.py::test_faulty"]["failed"] == {"peft": 0, "fused": 200}


def test_peft_suite_compare_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"has no test_lora\.py: give the folder of a PEFT checkout"):
        peft_suite.compare(tmp_path, ["test_lora.py"], [0])


@pytest.mark.slow
def test_peft_suite_run_uses_the_same_seed_on_both_sides(checkout: Path) -> None:
    test = "tests/test_lora.py::test_of_two_seeds"
    for seed, outcome in enumerate(["passed", "failed"]):
        for fused in (False, True):
            assert peft_suite.run(checkout, [test], fused=fused, seed=seed)["outcomes"] == {test: outcome}


@pytest.mark.peers
def test_peft_suite_has_no_worse_lora_test(request: pytest.FixtureRequest, write_results: bool) -> None:
    checkout = request.config.getoption("--peft-checkout")
    if checkout is None:
        pytest.skip("needs --peft-checkout: PEFT's tests are not in its wheel")
    files = request.config.getoption("--peft-tests") or peft_suite.FILES
    seeds = request.config.getoption("--peft-seeds")
    result = peft_suite.compare(checkout, files, seeds)
    if write_results:
        record = records.provenance(
            f"make conformance ARGS='--peft-checkout peft --peft-seeds {' '.join(map(str, seeds))}'"
        )
        versions = {**record["versions"], "peft": result["peft"]}
        written = {name: value for name, value in result.items() if name != "peft"}
        records.write_json(RECORDED, {**record, "versions": versions, **written})
        tables.replace_section(PAGE, "peft_suite", peft_suite.table(json.loads(RECORDED.read_text(encoding="utf-8"))))
    assert not result["worse"]


def test_peft_suite_table_matches_its_results() -> None:
    made = peft_suite.table(json.loads(RECORDED.read_text(encoding="utf-8")))
    assert made == tables.section(PAGE.read_text(encoding="utf-8"), "peft_suite")
