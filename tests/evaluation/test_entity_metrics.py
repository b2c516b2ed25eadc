"""Precision, recall and F1 of entities against nervaluate, and with intervals over rows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.errors import RecipeError
from peftlab.evaluation.comparison import Comparison
from peftlab.evaluation.held_out_scores import HeldOutScores
from peftlab.evaluation.metrics import check_metrics, default_metrics, flat_names
from peftlab.evaluation.scorer import Scorer
from peftlab.specs.tasks import TASKS, spec_of

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
FAMILIES = ["entity_f1", "entity_precision", "entity_recall"]
SPEC = TASKS["token_cls"]


def random_rows(seed: int, count: int = 40) -> list[tuple[list[str], list[str]]]:
    """Predicted and true tags of rows; predictions are often right. nervaluate reads an I- as the start of an entity only
    after O, so that an I- continues its own label here."""
    rng = random.Random(seed)

    def tags(length: int) -> list[str]:
        found: list[str] = []
        while len(found) < length:
            label, size = rng.choice(["O", "O", "LOC", "PER"]), rng.randint(1, 3)
            found += ["O"] * size if label == "O" else [f"B-{label}", *[f"I-{label}"] * (size - 1)]
        return found[:length]

    rows = []
    for _ in range(count):
        true = tags(rng.randint(1, 12))
        predicted = list(true) if rng.random() < 0.4 else tags(len(true))
        rows.append((predicted, true))
    return rows


def columns(rows: list[tuple[list[str], list[str]]]) -> dict[str, Any]:
    index = {name: i for i, name in enumerate(NAMES)}
    return {
        "predictions": [index[t] for predicted, _ in rows for t in predicted],
        "references": [index[t] for _, true in rows for t in true],
        "row_starts": [int(i == 0) for _, true in rows for i in range(len(true))],
    }


def scores(rows: list[tuple[list[str], list[str]]]) -> dict[str, float | None]:
    scorer = Scorer(FAMILIES, class_names=NAMES)
    for first in range(0, len(rows), 7):
        scorer.add(columns(rows[first : first + 7]))
    return scorer.compute()


@pytest.mark.parametrize("seed", range(5))
def test_values_equal_those_of_nervaluate(seed: int) -> None:
    from nervaluate import Evaluator

    rows = random_rows(seed)
    theirs = Evaluator([true for _, true in rows], [found for found, _ in rows], tags=["LOC", "PER"], loader="list")
    result = theirs.evaluate()
    ours = scores(rows)
    for share in ("f1", "precision", "recall"):
        assert ours[f"entity_{share}"] == pytest.approx(getattr(result["overall"]["strict"], share))
        for label in ("LOC", "PER"):
            of_label = result["entities"][label]["strict"]
            assert ours[f"entity_{share}_{label}"] == pytest.approx(getattr(of_label, share))


def test_a_wrong_end_or_label_counts_as_missed_and_as_invented() -> None:
    true = ["B-PER", "I-PER", "O", "B-LOC"]
    assert scores([(["B-PER", "I-PER", "O", "B-PER"], true)])["entity_f1"] == 0.5
    assert scores([(["B-PER", "O", "O", "B-LOC"], true)])["entity_f1"] == 0.5
    assert scores([(["O"] * 4, true)])["entity_f1"] == 0.0


def test_an_entity_ends_with_its_row() -> None:
    apart = scores([(["B-PER"], ["B-PER"]), (["I-PER"], ["I-PER"])])
    together = scores([(["B-PER", "I-PER"], ["B-PER", "I-PER"])])
    assert (apart["entity_f1"], together["entity_f1"]) == (1.0, 1.0)
    scorer = Scorer(FAMILIES, class_names=NAMES)
    scorer.add(columns([(["B-PER"], ["B-PER"]), (["I-PER"], ["O"])]))
    assert scorer.compute()["entity_precision"] == 0.5  # one entity of two words would be wrong


def test_a_label_without_entities_has_no_value() -> None:
    found = scores([(["B-LOC", "O"], ["O", "B-PER"])])
    assert found["entity_f1_LOC"] is None and found["entity_f1_PER"] == 0.0


def test_names_with_spaces_and_equal_slugs_stay_apart() -> None:
    names = ["O", "B-a b", "I-a b", "B-a_b", "I-a_b"]
    scorer = Scorer(["entity_f1"], class_names=names)
    scorer.add({"predictions": [1, 3], "references": [1, 0], "row_starts": [1, 1]})
    assert scorer.compute() == {"entity_f1": pytest.approx(2 / 3), "entity_f1_a_b": 1.0, "entity_f1_a_b_1": None}
    assert flat_names(["entity_f1"], names) == ["entity_f1", "entity_f1_a_b", "entity_f1_a_b_1"]


def test_a_card_has_the_same_values_with_intervals() -> None:
    rows = random_rows(9)
    index = {name: i for i, name in enumerate(NAMES)}
    card = HeldOutScores(SPEC, len(rows), "entity_recall_PER", class_names=NAMES)
    for order in np.array_split(np.random.default_rng(0).permutation(len(rows)), 6):
        found = torch.tensor([index[t] for i in order for t in rows[i][0]])
        true = torch.tensor([index[t] for i in order for t in rows[i][1]])
        where = torch.tensor([int(i) for i in order for _ in rows[i][1]])
        logits = torch.nn.functional.one_hot(found, len(NAMES)).float()
        for part in (slice(None, 5), slice(5, None)):  # a row may come in two parts
            card.add_logits(logits[part], true[part], where[part])
    ours, estimates = scores(rows), card.estimates()
    for name in (*FAMILIES, "entity_recall_PER"):
        assert estimates[name].value == pytest.approx(ours[name])
        interval = estimates[name].interval()
        assert interval.low < interval.value < interval.high


def test_a_card_of_word_tags_has_no_entities() -> None:
    comparison = Comparison(1, predicts="token classes")
    comparison.add(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    assert not [name for name in comparison.columns() if name.startswith("entities")]


def test_metrics_of_the_two_forms() -> None:
    tags = spec_of("token_cls", ("word_tags",))
    assert default_metrics(SPEC, False) == ["loss", "accuracy", *FAMILIES]
    assert default_metrics(tags, False) == ["loss", "accuracy", "precision", "recall", "f1"]
    check_metrics(["entity_f1_PER", "f1_B-PER"], SPEC, False, class_names=NAMES)
    with pytest.raises(RecipeError, match="did you mean 'entity_f1_PER'"):
        check_metrics(["entity_f1_PRE"], SPEC, False, class_names=NAMES)
    with pytest.raises(RecipeError, match="'entity_f1' does not apply"):
        check_metrics(["entity_f1"], tags, False)
