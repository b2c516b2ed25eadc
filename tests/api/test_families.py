"""Families of models: train, evaluate again, plain PEFT, merge, batch against alone, resume; as docs/families.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftlab
from peftlab.errors import RecipeError
from peftlab.training.progress import SilentProgress
from tests import adapter_table
from tests.family_examples import wide_values, write_family
from tests.family_table import COLUMNS, PAGE, families, family_recipe, measure_in, read_page, title, write_rows

# One of each kind of layer, adapter and padding, and one that is refused; the others run with the slow tests.
QUICK = {
    ("GPT2Config", "causal_lm"),
    ("MixtralConfig", "causal_lm"),
    ("DistilBertConfig", "masked_lm"),
    ("XLNetConfig", "seq_cls"),
    ("ReformerConfig", "seq_cls"),
    ("BertConfig", "token_cls"),
    ("ResNetConfig", "image_cls"),
    ("BertConfig", "embedding"),
    ("GPT2Config", "reranking"),
}
ROWS = [pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow, id="-".join(row)) for row in families()]


@pytest.mark.parametrize(("name", "task"), ROWS)
def test_family_does_what_the_page_says(name: str, task: str, tmp_path: Path, process: Any) -> None:
    row = measure_in(tmp_path, name, task, process)
    cells, notes = read_page()[row.family, row.task]
    assert [row.cells[column] for column in COLUMNS] == cells, str(row)
    assert row.notes == notes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), adapter_table.rows())
def test_adapters_and_storages_do_what_the_page_says(
    name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measured = adapter_table.measure(name, task)
    assert list(measured.values()) == adapter_table.read_section(PAGE.read_text())[title(name, task), task]


def test_page_has_every_family() -> None:
    assert read_page().keys() == {(title(name, task), task) for name, task in families()}
    assert len(adapter_table.read_section(PAGE.read_text())) == len(list(adapter_table.rows()))


def test_no_cell_of_the_page_is_no() -> None:
    rows = read_page()
    assert rows
    for (family, task), (cells, notes) in rows.items():
        works = len(cells) == len(COLUMNS) and set(cells[:-2]) == {"yes"} and set(cells[-2:]) <= {"yes", "-", "refused"}
        assert works or (cells == ["refused"] * len(COLUMNS) and notes), (family, task)


@pytest.mark.parametrize(
    ("name", "task", "storage", "why"),
    [
        ("ConvNextConfig", "image_cls", "int8", "keeps images as grids"),
        ("BigBirdConfig", "seq_cls", "int8", "from sparse to full attention"),
        ("RwkvConfig", "causal_lm", "nf4", "computes with the weights"),
        ("DeepseekV3Config", "causal_lm", "int8", "in four dimensions"),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused(
    name: str, task: str, storage: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    write_family(Path("model"), name, task, **wide_values(name, task))
    with pytest.raises(RecipeError, match=why) as refused:
        peftlab.check(family_recipe(task, model={"quantize": storage}), progress=SilentProgress())
    assert refused.value.key == "model.quantize"


def test_experts_that_a_recipe_names_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    write_family(Path("model"), "MixtralConfig", "causal_lm")
    adapter = {"targets": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    run = peftlab.train(family_recipe("causal_lm", adapter=adapter), progress=SilentProgress())
    assert run.summary["adapter"]["kinds"] == {"experts.down_proj": 2, "q_proj": 2}


def test_dora_trains_on_int8_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT moves an int8 weight at each forward, and bitsandbytes then loses its scales."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    write_family(Path("model"), "BertConfig", "seq_cls", **wide_values("BertConfig", "seq_cls"))
    document = family_recipe("seq_cls", adapter={"dora": True}, model={"quantize": "int8"})
    run = peftlab.train(document, progress=SilentProgress())
    again = peftlab.evaluate("run", progress=SilentProgress())["metrics"]["loss"]
    assert again == pytest.approx(run.summary["after"]["loss"], rel=1e-4)
    assert peftlab.merge("run", base="dequantized", progress=SilentProgress())["verified"]
