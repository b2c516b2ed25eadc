"""Answers that a model writes: their tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.adapters import HeadLoss
from peftlab.data import Rows, answered
from peftlab.data.chat import Formatter
from peftlab.tasks.causal_lm import CausalLM

END = 2
ROWS = Rows.from_dicts(
    [{"q": "why?", "a": "because"}, {"q": "how", "a": "so \u00e9"}, {"q": "", "a": "it is"}], name="rows"
)
TEMPLATES = [{"user": "{q}", "assistant": "{a}"}, {"prompt": "Q {q} A", "completion": " {a}"}]


def task_of(tokenizer: Any, template: dict[str, str]) -> Any:
    formatter = Formatter(tokenizer, columns={}, template=template, available=["q", "a"])
    return CausalLM(tokenizer, formatter, head_loss=HeadLoss())


def answers_of(task: Any, template: dict[str, str], *, end: bool) -> list[np.ndarray]:
    """The rows' own answers, as a model would write them."""
    texts = [(template.get("assistant") or template["completion"]).format(**ROWS.row(i)) for i in range(len(ROWS))]
    ids = [task.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [np.array(row + [END] * end, dtype=np.int32) for row in ids]


@pytest.mark.parametrize("template", TEMPLATES, ids=["chat", "completion"])
def test_answer_that_ended_is_trained_like_a_row_of_the_data(
    tokenizer_of: Callable[[str], Any], template: dict[str, str]
) -> None:
    """The same text gives the same example as a row of the data, up to the end of the turn. What a template writes
    after it is not trained."""
    task = task_of(tokenizer_of("tiny:llama"), template)
    theirs = task.encode(ROWS, max_length=512, too_long="error", training=True)
    ours = task.encode_answers(ROWS, answers_of(task, template, end=True), max_length=512)
    assert len(ours.examples) == len(ROWS)
    for mine, own in zip(ours.examples, theirs.examples, strict=True):
        length = len(mine)
        assert mine.ids.tolist() == own.ids[:length].tolist()
        assert mine.trained.tolist() == own.trained[:length].tolist() and not own.trained[length:].any()
        assert (mine.row, mine.weight) == (own.row, own.weight) and mine.weight == mine.trained.sum()
    report = ours.ledger.report()
    assert report["answers"] == {"count": 3, "ended": 3, "cut": 0, "terminators": {"<|im_end|>": 3}}


@pytest.mark.parametrize("template", TEMPLATES, ids=["chat", "completion"])
def test_answer_that_was_cut_off_gets_no_end(tokenizer_of: Callable[[str], Any], template: dict[str, str]) -> None:
    """Only its words are trained. The formatter would have added an end and taught the model to stop there."""
    task = task_of(tokenizer_of("tiny:llama"), template)
    answers = answers_of(task, template, end=False)
    encoded = task.encode_answers(ROWS, answers, max_length=512)
    for example, answer in zip(encoded.examples, answers, strict=True):
        assert example.ids[-len(answer) :].tolist() == answer.tolist()
        assert example.trained.sum() == len(answer) and example.trained[-len(answer) :].all()
        assert END not in example.ids[example.trained]
    assert encoded.ledger.report()["answers"] == {"count": 3, "ended": 0, "cut": 0, "terminators": {}}


def test_answer_tokens_stay_as_written(tokenizer_of: Callable[[str], Any]) -> None:
    """The tokens are half of a character's bytes. They are no text, and the tokenizer would not split a text so."""
    task = task_of(tokenizer_of("tiny:llama"), TEMPLATES[0])
    half = task.tokenizer("\u00e9", add_special_tokens=False).input_ids[:1]
    answers = [np.array([*half, END], dtype=np.int32)] * 3
    assert task.tokenizer(task.text_of(answers[0]), add_special_tokens=False).input_ids != half
    for example in task.encode_answers(ROWS, answers, max_length=512).examples:
        assert example.ids[example.trained].tolist() == [*half, END]


def test_answers_that_are_empty_are_dropped_and_counted(tokenizer_of: Callable[[str], Any]) -> None:
    """An answer that has only its end is empty too."""
    task = task_of(tokenizer_of("tiny:llama"), TEMPLATES[0])
    answers = [np.zeros(0, dtype=np.int32), np.array([END], dtype=np.int32), np.array([100, END], dtype=np.int32)]
    encoded = task.encode_answers(ROWS, answers, max_length=512)
    assert [e.row for e in encoded.examples] == [2]
    (left_out,) = encoded.ledger.report()["left_out"]
    assert (left_out["reason"], left_out["rows"]) == ("dropped: the answer is empty", 2)
    assert encoded.ledger.report()["trained"] == 2


def test_answered_without_answers_is_empty() -> None:
    tokens = answered([], [], author="student", stop_ids={END})
    assert len(tokens) == 0 and len(tokens.ids) == 0 and tokens.role_names == ("prompt", "student")


def test_write_answers_equals_greedy_generation(tiny: Any, tokenizer_of: Callable[[str], Any]) -> None:
    """``write_answers`` and ``generate`` give the same text, and an answer stops at its first end."""
    task, model = task_of(tokenizer_of("tiny:llama"), TEMPLATES[0]), tiny("tiny:llama", adapter=False).eval()
    options = {"batch_tokens": 4096, "max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0}
    written = dict(task.write_answers(model, ROWS, **options))
    texts = [row["text"] for row in task.generate(model, ROWS, max_length=512, **options)]
    assert [task.text_of(written[i]).strip() for i in range(3)] == texts
    assert all(len(answer) == 6 or task.ends(answer) for answer in written.values())
    assert not task.ends(np.zeros(0, dtype=np.int32)) and task.ends(np.array([5, END]))


def writer(tiny: Any) -> Any:
    """A model with large random weights, whose answers differ; those of the tiny models repeat a token."""
    model = tiny("tiny:llama", adapter=False).eval()
    draw = torch.Generator().manual_seed(0)
    for name, weights in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weights, std=0.5, generator=draw)
    return model


def scored(task: Any, model: Any, rows: Rows, *, max_length: int = 512, too_long: str = "error") -> Any:
    encoded = task.encode(rows, max_length=max_length, too_long=too_long, training=False)
    return task.score_answers(model, task.collate(encoded.examples, "cpu"))


@pytest.mark.parametrize("template", TEMPLATES, ids=["chat", "completion"])
def test_scored_answers_are_those_to_the_prompts(
    tiny: Any, tokenizer_of: Callable[[str], Any], template: dict[str, str]
) -> None:
    """They do not depend on the row's own answer, which is the reference."""
    task, model = task_of(tokenizer_of("tiny:llama"), template), writer(tiny)
    texts = [r["text"] for r in task.generate(model, ROWS, batch_tokens=999, max_length=512, max_new_tokens=64)]
    columns = scored(task, model, ROWS)
    assert len(set(texts)) == 3
    assert columns["answers"] == texts
    assert columns["reference_texts"] == ["because", "so \u00e9", "it is"]


def test_reference_of_a_cut_row_is_whole(tiny: Any, tokenizer_of: Callable[[str], Any]) -> None:
    task, model = task_of(tokenizer_of("tiny:llama"), TEMPLATES[1]), writer(tiny)
    columns = scored(task, model, ROWS.select([0]), max_length=12, too_long="truncate")
    assert columns["reference_texts"] == ["because"]


def test_last_answer_of_a_conversation_is_scored(tiny: Any, tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer, model = tokenizer_of("tiny:llama"), writer(tiny)
    turns = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = Rows.from_dicts([{"messages": messages}], name="rows")
    task = CausalLM(
        tokenizer, Formatter(tokenizer, columns={}, template=None, available=["messages"]), head_loss=HeadLoss()
    )
    columns = scored(task, model, rows)
    (whole,) = task.generate(model, rows, batch_tokens=999, max_length=512, max_new_tokens=64)
    assert columns == {"answers": [whole["text"]], "reference_texts": ["2"]}


def test_prompt_without_room_for_the_answer_is_cut_at_its_start(tiny: Any, tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer, model = tokenizer_of("tiny:llama"), writer(tiny)
    formatter = Formatter(tokenizer, columns={}, template=TEMPLATES[1], available=["q", "a"])
    task = CausalLM(tokenizer, formatter, head_loss=HeadLoss(), max_new_tokens=6, most_tokens=10)
    wanted = task.generate(model, ROWS, batch_tokens=999, max_length=10, max_new_tokens=6)
    assert scored(task, model, ROWS)["answers"] == [row["text"] for row in wanted]
