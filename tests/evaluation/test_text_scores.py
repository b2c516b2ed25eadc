"""Scores of written texts: sacrebleu's and rouge-score's own values, of all rows and of drawn ones, and placeholders."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from peftlab.evaluation.modules import row_statistics
from peftlab.evaluation.scorer import Scorer
from peftlab.evaluation.text_scores import answer_rows, kept_placeholders, signatures

ANSWERS = ["the cat sat on the mat", "a dog runs", "there is nothing here", "hello"]
REFERENCES = ["the cat sits on the mat", "a dog runs fast", "nothing is there", "goodbye now"]


def scored(*names: str, answers: list[str] = ANSWERS, references: list[str] = REFERENCES) -> dict[str, float | None]:
    scorer = Scorer(names)
    scorer.add({"answers": answers[:2], "reference_texts": references[:2]})
    scorer.add({"answers": answers[2:], "reference_texts": references[2:]})
    return scorer.compute()


def test_values_are_those_of_the_libraries() -> None:
    values = scored("bleu", "chrf", "rouge1", "rouge2", "rougeL")
    assert values["bleu"] == pytest.approx(BLEU().corpus_score(ANSWERS, [REFERENCES]).score)
    assert values["chrf"] == pytest.approx(CHRF().corpus_score(ANSWERS, [REFERENCES]).score)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score(r, a) for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert values[name] == pytest.approx(sum(row[name].fmeasure for row in rows) / 4)


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU), ("chrf", CHRF)])
def test_drawn_rows_have_the_value_of_their_own_corpus(name: str, metric: type) -> None:
    """Rows 0, 0, 2 and 1: not the mean of rows."""
    statistic = row_statistics(answer_rows(ANSWERS, REFERENCES))[name]
    drawn = [0, 0, 2, 1]
    wanted = metric().corpus_score([ANSWERS[i] for i in drawn], [[REFERENCES[i] for i in drawn]]).score
    assert statistic(np.array([[2.0, 1.0, 1.0, 0.0]])) == pytest.approx([wanted])
    assert statistic(np.ones((1, 4))) != pytest.approx([wanted])


def test_signatures_say_how() -> None:
    assert signatures()["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


def test_placeholders_are_kept_in_any_order_and_number() -> None:
    references = ["%(n)s Tage %s", "von {0} bis {b.c}", "kein Platz", "{{ name }} hier, 5 % mehr"]
    assert kept_placeholders(["%s: %(n)s", "{b.c} {0}", "", "{{ name }}"], references) == 1.0
    assert kept_placeholders(["%(n)s", "{0} {0}", "", "{{ nam }}"], references) == 0.0
    assert scored("placeholders", answers=["%d", "", "", ""], references=["%d", "%s", "a", "b"]) == {
        "placeholders": 0.5
    }
    assert scored("placeholders", answers=["a"] * 4, references=["b"] * 4) == {"placeholders": None}
