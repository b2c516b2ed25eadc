"""The cells of a sweep: counted by hand, the impossible ones, and the order of measurement."""

from __future__ import annotations

from typing import Any

import pytest

from peftlab.bench.sweep import Cell, Facts, cells_of, impossible, interleaved, make_sweep
from peftlab.errors import RecipeError
from peftlab.specs.methods import VARIANTS

ONE: dict[str, Any] = {
    "what": ["train"],
    "methods": ["lora"],
    "ranks": [8],
    "quantize": ["none"],
    "kernels": ["reference", "auto"],
    "batch": [4],
    "length": [64],
    "adapters": [1],
}
LLAMA = Facts("causal_lm", 128, 32)


def cell(**changes: Any) -> Cell:
    values = {"what": "train", "method": "lora", "rank": 8, "quantize": "none", "kernels": "auto", "batch": 4}
    return Cell(**{**values, "length": 64, "adapters": 1, **changes})


def test_cells_equal_those_listed_by_hand() -> None:
    keys = [c.key for c in cells_of(make_sweep(**{**ONE, "methods": ["lora", "full"], "ranks": [8, 16]}))]
    assert keys == [
        "train/lora/r8/none/reference/4x64/1",
        "train/lora/r8/none/auto/4x64/1",
        "train/lora/r16/none/reference/4x64/1",
        "train/lora/r16/none/auto/4x64/1",
        "train/full/-/none/reference/4x64/1",
        "train/full/-/none/auto/4x64/1",
    ], "full fine-tuning has no rank: once, not once per rank"


def test_duplicate_values_count_once() -> None:
    assert len(cells_of(make_sweep(**{**ONE, "ranks": [8, 8]}))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ["lorra"]},
            f"--methods: expected some of {', '.join(VARIANTS)}, found 'lorra'; did you mean 'lora'?",
        ),
        ({"quantize": ["nf8"]}, "--quantize: expected some of none, nf4, int8, found 'nf8'; did you mean 'nf4'?"),
        ({"kernels": []}, "nothing to measure: --kernels is empty; omit it to use the recipe's value, or give a value"),
        ({"batch": [0]}, "--batch: expected at least 1, found 0"),
        ({"length": [1]}, "--length: expected at least 2 tokens, of which one is predicted, found 1"),
    ],
)
def test_make_sweep_reports_wrong_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_sweep(**{**ONE, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"method": "full", "rank": None}, None),
        ({"method": "full", "rank": None, "quantize": "nf4"}, "cannot be trained"),
        ({"length": 129}, "reads at most 128 tokens"),
        ({"adapters": 2}, "training uses one adapter"),
        ({"what": "generate"}, None),
        ({"what": "generate", "adapters": 4}, None),
        ({"what": "generate", "adapters": 5}, "4 rows are fewer than 5 adapters"),
        ({"what": "generate", "adapters": 2, "method": "dora"}, "no batch of several DoRA"),
        ({"what": "generate", "adapters": 2, "method": "full"}, "full has no adapter"),
        ({"what": "generate", "length": 100}, "100 + 32 new tokens exceed the model's 128"),
    ],
)
def test_impossible_gives_the_reason_for_a_cell(changes: dict[str, Any], reason: str | None) -> None:
    why = impossible(cell(**changes), LLAMA)
    assert (why is None) if reason is None else (why is not None and reason in why)


def test_impossible_depends_on_task_and_machine() -> None:
    assert "causal language models only, and this is task seq_cls" in str(
        impossible(cell(what="generate"), Facts("seq_cls", 512, 32))
    )
    missing = Facts("causal_lm", 128, 32, no_bitsandbytes="No module named 'bitsandbytes'")
    assert "int8 needs bitsandbytes, which cannot be imported (No module" in str(
        impossible(cell(quantize="int8"), missing)
    )
    assert impossible(cell(), missing) is None
    images = Facts("image_cls", 17, 32, fixed_length=17)
    assert "has 17 tokens, not 64" in str(impossible(cell(), images))
    assert impossible(cell(length=17), images) is None


def test_impossible_without_the_units_for_rounded_operands() -> None:
    weak = Facts("causal_lm", 128, 32, no_operands={"cpu-bf16": "the processor has none of AMX"})
    assert impossible(cell(kernels="cpu-bf16"), weak) == "the processor has none of AMX"
    assert impossible(cell(kernels="cpu-bf16"), LLAMA) is None
    assert "add --quantize int8" in str(impossible(cell(kernels="cpu-int8"), LLAMA))
    assert impossible(cell(kernels="cpu-int8", quantize="int8"), LLAMA) is None
    for method in ("full", "dora"):
        assert f"{method} has no such path" in str(impossible(cell(kernels="cpu-bf16", method=method), LLAMA))


def test_interleaved_repetitions_go_there_and_back() -> None:
    cells = [cell(rank=rank) for rank in (1, 2, 3)]
    assert [[c.rank for c in interleaved(cells, i)] for i in range(3)] == [[1, 2, 3], [3, 2, 1], [1, 2, 3]]
