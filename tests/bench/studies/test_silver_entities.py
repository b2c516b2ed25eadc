"""The data of the recipe news-entities, and the list of entities that it is compared with."""

from __future__ import annotations

import json

import pytest

from bench.studies.silver_entities import HELD_OUT, LABELS, TRAIN, baseline, found, gazetteer
from peftlab.recipe import recipe_text


def test_held_out_sentences_are_not_training_sentences_and_spans_are_words() -> None:
    train, held_out = ([json.loads(line) for line in path.open(encoding="utf-8")] for path in (TRAIN, HELD_OUT))
    plain = [{" ".join(row["text"].casefold().split()) for row in rows} for rows in (train, held_out)]
    assert not plain[0] & plain[1]
    assert (len(train), len(held_out)) == (len(plain[0]), len(plain[1])) == (4159, 960)
    for row in [*train, *held_out]:
        for start, end, label in row["spans"]:
            assert label in LABELS and row["text"][start:end].strip() == row["text"][start:end] != ""


def test_the_list_takes_the_longest_match_and_the_most_frequent_label() -> None:
    rows = [
        {"text": "New York", "spans": [[0, 8, "GPE"]]},
        {"text": "New York Times", "spans": [[0, 14, "ORG"]]},
        {"text": "New York", "spans": [[0, 8, "ORG"]]},
        {"text": "New York", "spans": [[0, 8, "GPE"]]},
    ]
    names = gazetteer(rows)
    assert list(found("The New York Times, New York and York", names)) == [(4, 18, "ORG"), (20, 28, "GPE")]


def test_the_header_of_the_recipe_states_the_list() -> None:
    values = baseline()
    assert values["f1"] == pytest.approx(0.523, abs=5e-4)
    header = recipe_text("news-entities")
    assert all(f"{values[name]:.3f}" in header for name in ("f1", "precision", "recall"))
