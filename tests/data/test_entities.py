"""Entities of tags in every scheme, compared with nervaluate and with a state machine written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data.entities import Entity, begins_inside, bio_classes, bio_tags, entities_of, entity_labels

LABELS = ("PER", "LOC", "new-york")


@st.composite
def placed(draw: st.DrawFn) -> tuple[int, list[Entity]]:
    """A number of words, and entities in them."""
    at, entities = 0, []
    for gap, length, label in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from(LABELS)), max_size=6)
    ):
        entities.append(Entity(at + gap, at + gap + length, label))
        at += gap + length
    return at + draw(st.integers(0, 2)), entities


def written(entities: list[Entity], length: int, scheme: str) -> list[str]:
    """The tags in a scheme: its letters for the first word of an entity, those inside, the last and a single one."""
    first, inside, last, single = scheme
    tags = ["O"] * length
    for start, end, label in entities:
        letters = single if end - start == 1 else first + inside * (end - start - 2) + last
        tags[start:end] = [f"{letter}-{label}" for letter in letters]
    return tags


@pytest.mark.parametrize("scheme", ["BIIB", "BIES", "BILU", "BMES", "BMEW"])
@given(case=placed())
def test_every_scheme_gives_the_entities_that_it_was_written_from(scheme: str, case: tuple[int, list[Entity]]) -> None:
    length, entities = case
    tags = written(entities, length, scheme)
    assert entities_of(tags) == entities
    assert not begins_inside(tags)
    assert entities_of(bio_tags(entities, length)) == entities


@given(case=placed())
def test_iob1_writes_b_only_after_an_entity_of_the_same_label(case: tuple[int, list[Entity]]) -> None:
    length, entities = case
    tags = ["O"] * length
    for before, (start, end, label) in zip([None, *entities], entities, strict=False):
        touches = before is not None and before.end == start and before.label == label
        tags[start:end] = [f"{'B' if touches else 'I'}-{label}", *[f"I-{label}"] * (end - start - 1)]
    assert entities_of(tags) == entities
    assert begins_inside(tags) == any(tags[e.start].startswith("I") for e in entities)


@given(st.lists(st.sampled_from(["O", *(f"{p}-{label}" for p in "BI" for label in LABELS)]), max_size=12))
def test_any_bio_tags_give_the_chunks_of_conlleval(tags: list[str]) -> None:
    """The rule of conlleval.pl for B and I, word by word."""
    chunks: list[list[object]] = []
    previous = "O"
    for i, tag in enumerate(tags):
        if tag != "O":
            if tag[0] == "B" or previous == "O" or previous[2:] != tag[2:]:
                chunks.append([i, i, tag[2:]])
            chunks[-1][1] = i + 1
        previous = tag
    assert [list(e) for e in entities_of(tags)] == chunks


def test_tags_without_prefixes_join_neighbours() -> None:
    assert entities_of(["PER", "PER", "O", "LOC", "PER"]) == [(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "PER")]


def test_classes_are_bio_tags_of_sorted_labels() -> None:
    classes = bio_classes(["b", "a", "b"])
    assert classes == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert entity_labels(classes) == ["a", "b"]
