"""The distillation keys for the training rows, the student's initial weights and the headline of the verdict."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftlab
from peftlab.api.check import check
from peftlab.api.distill import distill
from peftlab.api.train import train
from peftlab.assembly.data import load_data
from peftlab.errors import DataError, RecipeError
from peftlab.evaluation import row_metrics
from peftlab.evaluation.modules import class_statistic
from peftlab.measuring.intervals import bootstrap
from peftlab.models import find_pretrained
from peftlab.models.student import StudentCut, make_student
from peftlab.recipe import load_recipe
from peftlab.training.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("short_timing")


def digits(folder: Path, distill: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    recipe = {
        "task": "image_cls",
        "model": {"name": "tiny:vit"},
        "adapter": {"method": "none"},
        "data": {"train": "sklearn:digits:train#300", "eval": "sklearn:digits:test#120", **data},
        "train": {"max_steps": 40, "batch_size": 32, "lr": 3e-3},
        "eval": {"before": False},
        "run": {"dir": str(folder / ("run" if distill else "teacher")), "device": "cpu"},
    }
    return recipe | ({"distill": {"teacher": str(folder / "teacher"), **distill}} if distill is not None else {})


@pytest.fixture
def untaught(trained: Any, tmp_path: Path) -> Path:
    """A folder with a teacher that knows the labels but is trained for one step only."""
    run = trained(digits(Path()) | {"train": {"max_steps": 1}}, lambda folder: None)
    shutil.copytree(run / "run", tmp_path / "teacher")
    return tmp_path


def test_exclude_removes_training_rows_and_keeps_their_class(tmp_path: Path) -> None:
    recipe = load_recipe(digits(tmp_path, exclude={"label": [3, "8"]})).recipe
    data = load_data(recipe)
    assert {"3", "8"} & set(data.train.columns["label"]) == set()
    assert {"3", "8"} <= set(data.eval.columns["label"])
    assert {"3", "8"} <= set(data.labelled.columns["label"])
    assert len(data.train) == sum(label not in ("3", "8") for label in data.labelled.columns["label"])


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ({"label": ["33"]}, "no row of sklearn:digits:train#300 has '33' in the column 'label'"),
        ({"lable": ["3"]}, "no column 'lable'.*did you mean 'label'"),
        ({"label": [str(i) for i in range(10)]}, "nothing is left to train on"),
    ],
)
def test_exclude_refuses_to_remove_no_row_or_all(tmp_path: Path, exclude: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(load_recipe(digits(tmp_path, exclude=exclude)).recipe)


def test_exclude_leaves_a_class_to_the_teacher_alone(tmp_path: Path) -> None:
    train(digits(tmp_path), progress=SilentProgress())
    init = {"weights": "random", "num_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    recipe = digits(
        tmp_path, {"student_init": init, "temperature": 8, "headline": "recall_3"}, exclude={"label": ["3"]}
    )
    card = distill(recipe, progress=SilentProgress()).summary["card"]
    head = card["metrics"][0]
    assert head["name"] == card["headline"] == "recall_3" and head["in_points"]
    assert head["baseline"]["value"] == 0
    # None of the test threes is right, so the bound is that of their number, not of all rows.
    threes = load_data(load_recipe(recipe).recipe).eval.columns["label"].count("3")
    assert head["baseline"]["high"] == pytest.approx(1 - 0.025 ** (1 / threes))
    assert card["metrics"][1]["name"] == "accuracy"
    assert card["costs"]["student"]["num_parameters"] < 0.25 * card["costs"]["teacher"]["num_parameters"]


@pytest.mark.parametrize("name", ["recall_33", "recall", "ece", "perplexity"])
def test_headline_that_is_no_metric_is_refused_before_training(untaught: Path, name: str) -> None:
    recipe = digits(untaught, {"headline": name})
    with pytest.raises(RecipeError, match="expected a metric of the report card"):
        distill(recipe, progress=SilentProgress())
    assert not (untaught / "run").exists()


def test_headline_of_a_class_without_held_out_rows_is_refused_before_training(untaught: Path) -> None:
    few = {"eval": "sklearn:digits:test#2"}
    present = set(map(str, load_data(load_recipe(digits(untaught, **few)).recipe).eval.columns["label"]))
    absent = next(digit for digit in "0123456789" if digit not in present)
    for run in (distill, check):
        with pytest.raises(
            RecipeError, match=f"no held-out row has the class '{absent}', so recall_{absent} cannot"
        ) as caught:
            run(digits(untaught, {"headline": f"recall_{absent}"}, **few), progress=SilentProgress())
        assert caught.value.key == "distill.headline"
    assert not (untaught / "run").exists()


@pytest.mark.parametrize("family", ["recall", "precision", "f1"])
def test_class_statistic_equals_scikit_learn_on_every_draw(family: str) -> None:
    from sklearn import metrics

    score = {"recall": metrics.recall_score, "precision": metrics.precision_score, "f1": metrics.f1_score}[family]
    rng = np.random.default_rng(0)
    predicted, right = rng.integers(0, 4, 40), rng.integers(0, 4, 40)
    for index in range(5):  # class 4 has no rows
        rows = {"predicted_class": predicted.astype(float), "true_class": right.astype(float)}
        statistic, _ = class_statistic(family, rows, index)
        counts = rng.integers(0, 3, (6, 40)).astype(float)
        for value, count in zip(statistic(counts), counts.astype(int), strict=True):
            a, b = predicted.repeat(count), right.repeat(count)
            assert value == pytest.approx(score(b, a, labels=[index], average="macro", zero_division=0.0))


def test_bootstrap_gives_a_share_of_0_an_interval() -> None:
    interval = bootstrap({"x": row_metrics.mean(np.zeros(50))}, 50, shares_of={"x": 0})["x"].interval()
    assert (interval.low, interval.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))


def test_make_student_with_random_weights_is_repeatable_and_copies_none(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def made(name: str, seed: int | None) -> dict[str, Any]:
        make_student(
            find_pretrained("tiny:llama"),
            StudentCut(layers=(1,)),
            tmp_path / name,
            auto_class="AutoModelForCausalLM",
            tokenizer=None,
            random_seed=seed,
        )
        return load_file(str(tmp_path / name / "model.safetensors"))

    copied, one, again, other = made("copied", None), made("one", 0), made("again", 0), made("other", 1)
    assert {n: t.shape for n, t in copied.items()} == {n: t.shape for n, t in one.items()}
    with pytest.raises(RecipeError, match="cannot be built with the student's sizes"):
        make_student(
            find_pretrained("tiny:bert"),
            StudentCut(hidden_size=63),
            tmp_path / "odd",
            auto_class="AutoModel",
            tokenizer=None,
            random_seed=0,
        )
    name = next(n for n in one if n.endswith("q_proj.weight"))
    assert one[name].equal(again[name])
    assert not one[name].equal(other[name]) and not one[name].equal(copied[name])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"weights": "random", "num_layers": 3}, "expected 1 to 2 layers, found 3"),
        ({"weights": "random", "num_key_value_heads": 2}, "no single num_key_value_heads"),
        ({"weights": "random", "num_layers": 1, "choose": "first"}, "choose"),
        ({"weights": "random", "sample_rows": 9}, "sample_rows"),
        ({"weights": "copied"}, "cuts nothing"),
    ],
)
def test_student_init_refuses_impossible_settings(untaught: Path, init: dict[str, Any], message: str) -> None:
    recipe = digits(untaught, {"student_init": init})
    with pytest.raises(RecipeError, match=message):
        distill(recipe, progress=SilentProgress())


def test_layer_losses_bring_the_layers_nearer_to_the_teacher(tmp_path: Path) -> None:
    """With a large weight, the student's only layer comes nearer to the teacher's than without."""

    notes: list[str] = []

    class Notes(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    peftlab.train(digits(tmp_path), progress=SilentProgress())
    losses = [
        "forward_kl",
        {"kind": "hidden_mse", "weight": 50, "layers": {0: 1}},
        {"kind": "relation_kl", "relation_heads": 2},
    ]
    recipe = digits(tmp_path, {"student_init": {"layers": [0]}, "losses": losses, "baseline": False})
    run = distill(recipe, progress=Notes())
    assert run.summary["card"]["verdict"]["text"]
    assert "hidden_mse: layers 0 and 1 of student and teacher" in notes
    assert "relation_kl: layers 0 and 1 of student and teacher" in notes
    plain = digits(tmp_path, {"student_init": {"layers": [0]}, "baseline": False})
    other = distill(plain, ["run.dir=" + str(tmp_path / "plain")], progress=SilentProgress())

    def distance(folder: Path) -> float:
        import torch
        from transformers import AutoModelForImageClassification

        pixels = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        states = []
        for where, layer in ((folder / "student", 0), (tmp_path / "teacher" / "model", 1)):
            model = AutoModelForImageClassification.from_pretrained(where)
            layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
            layers[layer].register_forward_hook(
                lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
            model(pixel_values=pixels)
        return float((states[0] - states[1]).detach().square().mean())

    assert distance(run.folder) < 0.8 * distance(other.folder)


@pytest.mark.parametrize(
    ("distilling", "message"),
    [
        ({"losses": [{"kind": "forward_kl", "layers": {0: 1}}]}, "layers: has no effect for kind: forward_kl"),
        ({"losses": [{"kind": "hidden_mse", "layers": {}}]}, "layers: is empty; write {0: 1}"),
        (
            {"losses": [{"kind": "hidden_mse", "relation_heads": 2}]},
            "relation_heads: has no effect for kind: hidden_mse",
        ),
        (
            {"losses": ["attention_kl"], "cache": "c"},
            "attention_kl compares the teacher's layers, but the cache stores only",
        ),
        (
            {"losses": ["hidden_mse"], "teacher": None, "teachers": ["a", "b"]},
            "hidden_mse compares the layers of one teacher",
        ),
        ({"losses": ["similarity_kl"]}, "similarity_kl compares vectors, and task: image_cls has none"),
        ({"losses": ["atention_kl"]}, "attention_kl"),
    ],
)
def test_layer_losses_refuse_impossible_settings(tmp_path: Path, distilling: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(digits(tmp_path, distilling))


def test_check_refuses_a_layer_loss_on_a_missing_layer(untaught: Path) -> None:
    recipe = digits(untaught, {"losses": [{"kind": "hidden_cosine", "layers": {0: 2}}]})
    with pytest.raises(RecipeError, match="hidden_cosine: the teacher has 2 layers, 0 to 1; found layer 2"):
        peftlab.check(recipe, progress=SilentProgress())
