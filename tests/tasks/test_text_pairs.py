"""Two texts per row: ids, types and truncation as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.data import Rows
from peftlab.errors import DataError
from peftlab.tasks.classification import Labels
from peftlab.tasks.seq_cls import SequenceClassification
from peftlab.tasks.texts import Texts

FIRST = ["a", "so long that it must be cut", "short", "abcdefghijklmnop"]
SECOND = ["the second one is longer here", "b", "equal", "qrstuvwxyzabcdefg"]
ROBERTA = {"single": "<|im_start|> $A <|im_end|>", "pair": "<|im_start|> $A <|im_end|> <|im_end|> $B <|im_end|>"}
BERT = {"single": "<|im_start|> $A <|im_end|>", "pair": "<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1"}


def rows_of(first: list[Any], second: list[Any]) -> Rows:
    labels = ["x", "y"] * (len(first) // 2)
    return Rows.from_dicts(
        [{"text": a, "pair": b, "label": c} for a, b, c in zip(first, second, labels, strict=True)], name="a.jsonl"
    )


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Callable[[dict[str, str]], Any]:
    def make(templates: dict[str, str]) -> Any:
        from tokenizers.processors import TemplateProcessing

        tokenizer = tokenizer_of("tiny:bert")
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**templates, special_tokens=special)
        return tokenizer

    return make


@pytest.mark.parametrize("templates", [BERT, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("limit", [99, 24, 17, 12, 9])
def test_ids_and_types_are_those_of_longest_first(tokenizer: Any, templates: Any, limit: int) -> None:
    made = tokenizer(templates)
    texts = Texts(made, "text", pair="pair", types=True)
    ((_, tokens),) = texts.pieces(rows_of(FIRST, SECOND))
    found = list(texts.fitted(tokens, np.minimum(tokens.lengths, limit)))
    for a, b, (_, ids, extra) in zip(FIRST, SECOND, found, strict=True):
        want = made(a, b, truncation="longest_first", max_length=limit, return_token_type_ids=True)
        assert ids.tolist() == want["input_ids"]
        if templates is BERT:
            assert extra["token_type_ids"].tolist() == want["token_type_ids"]


def test_cutting_the_first_text_only_is_caught(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_only(roles: np.ndarray, kept: int) -> np.ndarray:
        use = np.ones(len(roles), dtype=bool)
        use[np.flatnonzero(roles == 1)[: len(roles) - kept]] = False
        return use

    monkeypatch.setattr("peftlab.tasks.texts._cut_pair", first_only)
    with pytest.raises(AssertionError):
        test_ids_and_types_are_those_of_longest_first(tokenizer, BERT, 17)


def test_a_tokenizer_without_separator_gets_a_line_break(tokenizer_of: Callable[[str], Any]) -> None:
    made = tokenizer_of("tiny:llama")
    texts = Texts(made, "text", pair="pair")
    ((_, tokens),) = texts.pieces(rows_of(["ab", "c"], ["cd", "d"]))
    assert made.decode(tokens.ids[tokens.row(0)], skip_special_tokens=True) == "ab\ncd"


def test_a_pair_in_a_batch_has_the_outputs_of_the_model_alone(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    made, labels = tokenizer(BERT), Labels(["x", "y"])
    task = SequenceClassification(made, labels=labels, pair_column="pair", token_types=True)
    model = tiny("tiny:bert", **task.model_kwargs()).eval()
    encoded = task.encode(rows_of(FIRST, SECOND), max_length=99, too_long="error", training=True)
    with torch.no_grad():
        batch = task.outputs(model, task.collate(encoded.examples, "cpu")).values
        alone = [
            model(**made(a, b, return_tensors="pt", return_token_type_ids=True)).logits
            for a, b in zip(FIRST, SECOND, strict=True)
        ]
        assert torch.allclose(batch, torch.cat(alone), atol=1e-6)
        wrong = [
            model(**made(a, b, return_tensors="pt", return_token_type_ids=False)).logits
            for a, b in zip(FIRST, SECOND, strict=True)
        ]
        assert not torch.allclose(batch, torch.cat(wrong), atol=1e-4)
        reference = task.reference_outputs(model, encoded.examples, "cpu")
    assert torch.allclose(batch, reference.values, atol=1e-6)


def test_the_ledger_and_the_preview_name_both_texts(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer(BERT), labels=Labels(["x", "y"]), pair_column="pair")
    rows = rows_of(FIRST, SECOND)
    ledger = task.encode(rows, max_length=17, too_long="truncate", training=True).ledger
    seen = {entry["role"]: entry["seen"] for entry in ledger.report()["roles"]}
    assert seen == {"text": 1 + 13 + 5 + 7, "pair": 13 + 1 + 5 + 7, "tokenizer": 12}
    assert [role for _, role, _ in task.preview(rows, 1, max_length=17).segments if role != "tokenizer"] == [
        "text",
        "pair",
    ]


def test_a_missing_or_empty_second_text_is_named(tokenizer: Any) -> None:
    task = SequenceClassification(tokenizer(BERT), labels=Labels(["x", "y"]), pair_column="pair")
    options: dict[str, Any] = {"max_length": 99, "too_long": "error", "training": True}
    with pytest.raises(DataError, match=r"record 2: the second text is empty") as caught:
        task.encode(rows_of(["a", "b"], ["c", " "]), **options)
    assert caught.value.key == "data.columns.pair"
    with pytest.raises(DataError, match="no column 'pair'"):
        task.encode(Rows.from_dicts([{"text": "a", "label": "x"}], name="a"), **options)
    with pytest.raises(
        DataError, match=r"reads two texts, found one: 'hello'; give rows with the columns 'text' and 'pair'"
    ):
        task.row_from_text("hello")
