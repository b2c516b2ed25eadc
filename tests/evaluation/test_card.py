"""The report card: its content, and a verdict that follows from the figures."""

from __future__ import annotations

import json
import math
from typing import Any

import card_examples as examples
import numpy as np
import pytest
from scipy import stats

from peftlab.errors import RecipeError
from peftlab.evaluation import row_metrics
from peftlab.evaluation.card import as_metrics, make_card, paired
from peftlab.evaluation.card_shape import Card, Costs, Figures
from peftlab.measuring.intervals import Estimate, bootstrap


def _verdict(figures: Figures) -> str:
    return make_card(figures)["verdict"]["text"]


def _with_costs(figures: Figures, who: str, **costs: Any) -> Figures:
    for seed in figures["seeds"]:
        seed[who].update(costs)  # type: ignore[literal-required]
    return figures


def test_card_verdict_helped_over_five_seeds() -> None:
    card = make_card(examples.classification())
    assert card["verdict"]["outcome"] == "helped"
    assert card["verdict"]["text"] == (
        "Distillation helped: accuracy 0.695 against 0.472 for the same student trained on the labels alone "
        "(+22.3 points, 95 % interval +19.9 to +24.6 over seeds; better in 5 of 5). The student keeps 93.7 % of the "
        "teacher's accuracy at 50 % of its parameters and 2.1x its speed."
    )
    head = card["metrics"][0]
    gains = [line["gain"] for line in card["seeds"]]
    expected = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert head["gain"] == pytest.approx(
        {"value": np.mean(gains), "low": expected.low, "high": expected.high, "over": "seeds", "n": 5}
    )
    # One teacher for all seeds: its interval is over rows.
    assert head["teacher"] is not None and (head["teacher"]["over"], head["teacher"]["n"]) == ("rows", examples.ROWS)
    assert card["ratios"]["num_parameters"] == 0.5 and card["costs"]["student"]["steps"] == 300 and card["notes"] == []
    json.dumps(card, allow_nan=False)


def test_card_verdict_of_one_seed_names_its_interval() -> None:
    text = _verdict(examples.classification(1))
    assert text.startswith(
        "Distillation helped: accuracy 0.695 against 0.472 for the same student trained on the labels"
    )
    assert "over held-out rows; one seed: training noise is not in it)" in text


def test_card_verdict_no_difference_if_the_interval_contains_0() -> None:
    card = make_card(examples.classification(5, baseline=0.693, spread=0.004))
    assert card["verdict"]["outcome"] == "no_difference"
    assert card["verdict"]["text"].startswith("No difference: accuracy 0.695 against 0.693 for the same student")
    assert "over seeds, which contains 0; better in 3 of 5)" in card["verdict"]["text"]
    assert (
        "But against labels alone it is better in KL to the teacher (0.209 against 0.925)." in card["verdict"]["text"]
    )


def test_card_verdict_of_two_seeds_with_a_wide_interval_is_no_difference() -> None:
    card = make_card(examples.classification(2, baseline=0.683, spread=0.01))
    assert all(line["better"] for line in card["seeds"]) and card["verdict"]["outcome"] == "no_difference"
    assert "better in 2 of 2; few seeds make a wide interval)" in card["verdict"]["text"]
    # The teacher is 5.8 points ahead. Two seeds cannot prove it, but that says nothing against the teacher.
    assert "The teacher is" not in card["verdict"]["text"]
    ece = next(row for row in card["metrics"] if row["name"] == "ece")
    assert ece["student"] is not None and ece["student"]["low"] == 0.0


def test_card_verdict_did_not_help_if_worse_than_labels_alone() -> None:
    card = make_card(examples.classification(5, baseline=0.73))
    assert card["verdict"]["outcome"] == "did_not_help"
    assert card["verdict"]["text"].startswith(
        "Distillation did not help, the student is worse for it: accuracy 0.695 against 0.730"
    )


def test_card_verdict_without_a_baseline_claims_nothing() -> None:
    card = make_card(examples.classification(1, baseline=None))
    assert card["verdict"]["outcome"] == "not_compared"
    assert card["verdict"]["text"] == (
        "Not compared with labels alone (distill.baseline: false), so what the teacher added is not known: the student "
        "has accuracy 0.695 (95 % interval 0.671 to 0.717 over held-out rows). The student keeps 93.7 % of the teacher's "
        "accuracy at 50 % of its parameters and 2.1x its speed."
    )


def test_card_verdict_of_embeddings_compares_with_teacher_and_start() -> None:
    assert _verdict(examples.embedding()) == (
        "Not compared with labels alone (task embedding has no labels), so what the teacher added is not known: the "
        "student has Spearman 0.845 (95 % interval 0.837 to 0.853 over held-out rows). Before its training it had 0.573: "
        "a change of +0.272, 95 % interval +0.260 to +0.283 over held-out rows. The student has 50 % of the teacher's "
        "parameters and 2.1x its speed."
    )


@pytest.mark.parametrize("headline", ["kl", "perplexity", "loss"])
def test_card_verdict_of_a_language_model_prefers_less(headline: str) -> None:
    card = make_card(examples.language_model(headline))
    head = card["metrics"][0]
    assert (head["name"], head["higher_is_better"], card["verdict"]["outcome"]) == (headline, False, "helped")
    assert head["gain"] is not None and head["gain"]["value"] < 0 and card["seeds"][0]["better"] is True
    text = card["verdict"]["text"]
    assert "The student's perplexity is 1.26x the teacher's, at 74 % of its parameters and 1.4x its speed." in text
    if headline == "kl":
        assert text.startswith(
            "Distillation helped: KL to the teacher 0.200 against 0.346 for the same student trained"
        )
        assert "(-0.147 nats, 95 % interval -0.167 to -0.126 over held-out rows; one seed" in text


def test_card_verdict_names_metrics_that_contradict_the_headline() -> None:
    text = _verdict(examples.language_model("kl", baseline_nll=2.8))
    assert text.startswith("Distillation helped: KL to the teacher")
    assert (
        "But against labels alone it is worse in perplexity (18.73 against 16.45) and token accuracy (0.460 against"
        in text
    )
    assert "loss" not in text


@pytest.mark.parametrize(
    ("teacher", "baseline", "sentence"),
    [
        (0.61, 0.70, "The teacher is worse than the baseline (accuracy 0.610 against 0.700): there was nothing to learn from it."),
        (0.70, 0.7007, "The teacher is no better than the baseline (accuracy 0.700 against 0.701): there was little to learn from it."),
        (0.61, 0.64, "And yet the teacher itself is worse than the baseline (accuracy 0.610 against 0.640)."),
    ],
)  # fmt: skip
def test_card_verdict_names_a_teacher_no_better_than_the_baseline(
    teacher: float, baseline: float, sentence: str
) -> None:
    figures = examples.classification(5, teacher=teacher, baseline=baseline, spread=0.002)
    assert sentence in _verdict(figures)
    assert "teacher is" not in _verdict(examples.classification()) and "teacher itself" not in _verdict(
        examples.classification()
    )


def test_card_verdict_names_a_larger_or_slower_student() -> None:
    slow = {"value": 0.84, "low": 0.81, "high": 0.88, "over": "rounds", "n": 50}
    text = _verdict(_with_costs(examples.classification(), "student", num_parameters=15_000_000, speed=slow))
    assert "at 141 % of its parameters and 0.84x its speed. The student is larger than the teacher (1.4x its" in text
    same = {"value": 1.01, "low": 0.98, "high": 1.03, "over": "rounds", "n": 50}
    text = _verdict(_with_costs(examples.classification(), "student", num_parameters=10_649_088, speed=same))
    assert "at the same number of parameters and the same speed, as far as can be measured." in text
    assert "larger" not in text
    figures = examples.classification(student=0.76)
    assert "The student reaches 102.5 % of the teacher's accuracy" in _verdict(figures)


def test_card_verdict_leaves_out_costs_that_were_not_measured() -> None:
    figures = examples.classification()
    for seed in figures["seeds"]:
        for side in (seed["teacher"], seed["student"], seed["baseline"]):
            for name in set(side) - {"metrics"}:
                del side[name]  # type: ignore[misc]
    card = make_card(figures)
    assert (
        card["verdict"]["text"].endswith("The student keeps 93.7 % of the teacher's accuracy.") and card["ratios"] == {}
    )


def test_card_verdict_needs_enough_rows_and_finite_figures() -> None:
    card = make_card(examples.classification(1, teacher=1.0, baseline=0.25, student=0.5, rows=8))
    assert card["verdict"]["outcome"] == "undecided"
    assert card["verdict"]["text"].startswith("Too few held-out rows to tell (8; an interval needs 10): accuracy 0.500")
    metric = row_metrics.exp_ratio([2000.0] * 20, [1.0] * 20)
    lost = bootstrap({"perplexity": metric}, 20)
    good = bootstrap({"perplexity": row_metrics.exp_ratio([2.0] * 20, [1.0] * 20)}, 20)
    assert math.isinf(lost["perplexity"].value)
    assert _two(good, lost)["verdict"]["outcome"] == "helped"
    assert _two(lost, good)["verdict"]["outcome"] == "did_not_help"
    assert _two(lost, lost)["verdict"]["text"].startswith("No verdict: perplexity inf against inf")


def _two(student: dict[str, Estimate], baseline: dict[str, Estimate]) -> Card:
    seed: Any = {
        "seed": 17,
        "teacher": {"metrics": {}},
        "student": {"metrics": as_metrics(student)},
        "baseline": {"metrics": as_metrics(baseline)},
        "paired": paired(teacher={}, student=student, baseline=baseline),
    }
    return make_card({"headline": "perplexity", "num_rows": 20, "seeds": [seed]})


def test_card_verdict_of_equal_differences_over_seeds_is_no_difference() -> None:
    """On few rows accuracies take few values, and three equal differences have a t interval of width 0."""
    figures = examples.classification(1, teacher=0.8, baseline=0.70, student=0.75, rows=20)
    figures["seeds"] = [{**figures["seeds"][0], "seed": seed} for seed in (1, 2, 3)]
    card = make_card(figures)
    assert card["verdict"]["outcome"] == "no_difference"
    assert "all 3 seeds gave the same difference: training noise is not in it" in card["verdict"]["text"]


def test_card_notes_warn_of_unequal_budgets_and_of_few_rows() -> None:
    figures = _with_costs(examples.classification(), "baseline", steps=200)
    assert make_card(figures)["notes"] == ["Not the same budget: the student had 300 steps, the baseline 200."]
    figures = examples.classification(5, baseline=0.65, student=0.72, spread=0.0001, rows=40)
    figures["seeds"] = figures["seeds"][:3]
    for place, seed in enumerate(figures["seeds"]):
        seed["student"]["metrics"]["accuracy"]["value"] += 0.001 * place
        seed["paired"]["gain"]["accuracy"]["value"] += 0.001 * place
    card = make_card(figures)
    assert card["verdict"]["outcome"] == "helped"
    assert card["notes"][0].startswith("With other held-out rows it might come out differently: in ")


def test_card_paired_figures_are_those_of_the_estimates() -> None:
    figures = examples.classification(1)
    head = make_card(figures)["metrics"][0]
    assert head["gain"] is not None and head["kept"] is not None and head["lead"] is not None
    assert head["gain"]["value"] == pytest.approx(0.695 - 0.472, abs=1e-3)
    assert head["lead"]["value"] == pytest.approx(0.741 - 0.472, abs=1e-3)
    assert head["kept"]["value"] == pytest.approx(0.695 / 0.741, abs=1e-3)
    for interval in (head["gain"], head["lead"], head["kept"]):
        assert interval["low"] is not None and interval["high"] is not None
        assert interval["low"] < interval["value"] < interval["high"]


def test_make_card_refuses_mistakes_of_the_caller() -> None:
    figures = examples.classification(1)
    with pytest.raises(ValueError, match="'perplexity' among the metrics of every student"):
        make_card({**figures, "headline": "perplexity"})
    with pytest.raises(ValueError, match="expected at least one seed"):
        make_card({**figures, "seeds": []})
    estimates = bootstrap({"acuracy": row_metrics.mean([1.0] * 20)}, 20)
    with pytest.raises(RecipeError, match="acuracy"):
        paired(teacher=estimates, student=estimates)


def test_card_costs_hold_only_measured_values() -> None:
    figures = examples.classification(2)
    figures["seeds"][0]["student"]["seconds"] = 80.0
    figures["seeds"][1]["student"]["seconds"] = 90.0
    del figures["seeds"][1]["student"]["peak_memory_bytes"]
    card = make_card(figures)
    assert card["costs"]["student"]["seconds"] == 85.0 and "peak_memory_bytes" not in card["costs"]["student"]
    assert "num_trained" not in card["costs"]["teacher"] and set(card["costs"]["student"]) <= set(Costs.__annotations__)
