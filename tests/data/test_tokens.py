"""Which tokens are trained, who wrote them, and how answers end, compared with a plain loop over tokens and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from peftlab.data import Rows, pieces, tokenize
from peftlab.data.chat_template import Part, Rendered

EOS = 2


@dataclass
class Scripted:
    """A tokenizer that gives each text its scripted tokens."""

    script: dict[str, list[tuple[int, tuple[int, int]]]]
    eos_token_id: int | None = None

    def __call__(self, texts: list[str], **_: Any) -> Any:
        offsets = [[offset for _, offset in self.script[t]] for t in texts]
        # A tokenizer adds tokens without characters.
        ids = [[i for i, _ in self.script[t]] for t in texts]
        encodings = [
            SimpleNamespace(ids=i, offsets=o, special_tokens_mask=[int(a == b) for a, b in o])
            for i, o in zip(ids, offsets, strict=True)
        ]
        return BatchEncoding({"input_ids": ids}, encodings, n_sequences=1)


def by_loop(row: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[bool], list[str]]:
    """Mask and roles of one row, token by token. It adds no end and does not untrain the first token."""
    trained, roles = [False] * len(ids), ["rest"] * len(ids)
    for part in row.parts:
        inside = [k for k, (a, b) in enumerate(offsets) if b > part.start and a < part.end]
        stops = [k for k in inside if ids[k] == EOS and offsets[k][1] > offsets[k][0]]
        if part.trained and stops and not row.text[offsets[stops[-1]][1] : part.end].strip():
            inside = [k for k in inside if k <= stops[-1]]
        for k in inside:
            roles[k] = part.role
            trained[k] = part.trained and offsets[k][1] > offsets[k][0]
    return trained, roles


@st.composite
def scripted_rows(draw: st.DrawFn) -> tuple[list[Rendered], dict[str, list[tuple[int, tuple[int, int]]]]]:
    rows, script = [], {}
    for i in range(draw(st.integers(1, 4))):
        cuts = sorted(draw(st.sets(st.integers(1, 29), max_size=12)))
        bounds = [0, *cuts, 30]
        # Some tokens lose the space before them, as byte-level tokenizers report it. Some have no characters.
        offsets = [(a + (draw(st.booleans()) and b - a > 1), b) for a, b in pairwise(bounds)]
        if draw(st.booleans()):
            offsets.append((0, 0))
        letters = draw(st.text("ab \n", min_size=30 - len(str(i)), max_size=30 - len(str(i))))
        text = f"{i}{letters}"
        script[text] = [(draw(st.sampled_from([EOS, 5, 6])), o) for o in offsets]
        ends = sorted(draw(st.sets(st.integers(0, 30), min_size=2, max_size=8)))
        spans = list(zip(ends[::2], ends[1::2], strict=False))
        rows.append(
            Rendered(text, [Part(a, b, draw(st.sampled_from("xy")), trained=draw(st.booleans())) for a, b in spans])
        )
    return rows, script


@settings(max_examples=200, deadline=None)
@given(drawn=scripted_rows())
def test_tokenize_gives_masks_and_roles_of_the_plain_loop(drawn: Any) -> None:
    rows, script = drawn
    got = tokenize(Scripted(script), rows, chat=True, stop_ids={EOS})
    for i, row in enumerate(rows):
        ids, offsets = zip(*script[row.text], strict=True)
        trained, roles = by_loop(row, list(ids), list(offsets))
        span = got.row(i)
        assert got.ids[span].tolist() == list(ids)
        assert got.trained[span].tolist() == [False, *trained[1:]]
        named = [got.role_names[r] for r in got.roles[span]]
        real = [k for k, (a, b) in enumerate(offsets) if b > a]
        assert [named[k] for k in real] == [roles[k].replace("rest", "template") for k in real]
    assert got.num_trained(got.lengths).tolist() == [int(got.trained[got.row(i)].sum()) for i in range(len(rows))]


OFFSETS = [(0, 2), (2, 3), (3, 6), (6, 6), (6, 8), (8, 9)]


@pytest.mark.parametrize(
    ("spans", "ids", "expected", "ended"),
    [
        ([(0, 9)], [5] * 6, [0, 1, 1, 0, 1, 1], [0]),
        ([(3, 8)], [5] * 6, [0, 0, 1, 0, 1, 0], [0]),
        ([(4, 7)], [5] * 6, [0, 0, 1, 0, 1, 0], [0]),
        ([(3, 9)], [5, 5, 5, 5, EOS, 5], [0, 0, 1, 0, 1, 0], [1]),
        ([(3, 9)], [5, 5, EOS, 5, 5, 5], [0, 0, 1, 0, 1, 1], [0]),
        ([(0, 3), (6, 9)], [5, EOS, 5, 5, EOS, 5], [0, 1, 0, 0, 1, 0], [1, 1]),
        ([(3, 3)], [5] * 6, [0] * 6, [0]),
        ([], [5] * 6, [0] * 6, []),
    ],
)
def test_tokenize_trains_the_tokens_of_each_span(
    spans: Any, ids: list[int], expected: list[int], ended: list[int]
) -> None:
    row = Rendered("abcdefgh\n", [Part(a, b, "answer", trained=True) for a, b in spans])
    got = tokenize(Scripted({row.text: list(zip(ids, OFFSETS, strict=True))}), [row], chat=True, stop_ids={EOS})
    assert got.trained.astype(int).tolist() == expected
    assert got.answer_ended.astype(int).tolist() == ended


def test_tokenize_adds_the_end_of_an_open_answer() -> None:
    word = [(5, (0, 1)), (5, (1, 2))]
    script = {"qa": word, "qb": [(5, (0, 1)), (EOS, (1, 2))], "qc": [*word, (EOS, (0, 0))], "qd": word, "xx": word}
    rows = [Rendered(t, [Part(1, 2, "answer", trained=True)] if t != "xx" else []) for t in script]
    got = tokenize(Scripted(script, eos_token_id=EOS), rows, chat=True, stop_ids={EOS})
    lines = [(got.ids[s].tolist(), got.trained[s].astype(int).tolist()) for s in map(got.row, range(5))]
    assert lines == [
        ([5, 5, EOS], [0, 1, 1]),
        ([5, EOS], [0, 1]),
        ([5, 5, EOS], [0, 1, 1]),
        ([5, 5, EOS], [0, 1, 1]),
        ([5, 5], [0, 0]),
    ]
    assert got.answer_rows.tolist() == [0, 1, 2, 3]
    assert [got.ids[e - 1] for e in got.answer_ends] == [EOS] * 4
    assert [got.ids[b] for b in got.answer_starts] == [5, EOS, 5, 5]
    assert got.answer_ended.all()
    assert {got.role_names[r] for r in got.roles[got.trained]} == {"answer"}


def test_pieces_are_all_rows_in_order() -> None:
    lengths = [3, 3, 30, 3, 1, 1, 1, 1, 9, 2]
    rows = Rows.from_dicts([{"text": "x" * n} for n in lengths], name="data")
    rendered = pieces(
        rows, lambda part, wheres: [Rendered(row["text"], []) for row in part], max_rows=4, max_characters=10
    )
    got = list(rendered)
    assert [(first, [len(r.text) for r in part]) for first, part in got] == [
        (0, [3, 3]),
        (2, [30]),
        (3, [3]),
        (4, [1, 1, 1, 1]),
        (8, [9]),
        (9, [2]),
    ]


def test_tokenize_of_no_rows_is_empty() -> None:
    got = tokenize(Scripted({}, eos_token_id=EOS), [], chat=True, stop_ids={EOS})
    assert len(got) == 0 and not len(got.ids) and np.array_equal(got.bounds, [0])
