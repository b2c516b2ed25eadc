"""The loss ledger: every total is compared with the examples that training gets, every finding with its fault."""

from __future__ import annotations

import functools
import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.adapters import HeadLoss
from peftlab.data import Ledger, Rows, find, require
from peftlab.data import ledger as module
from peftlab.data.chat import ControlRule, Formatter
from peftlab.data.tokens import pieces
from peftlab.errors import DataError
from peftlab.tasks import Encoded
from peftlab.tasks import causal_lm as causal_lm_module
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.classification import Labels
from peftlab.tasks.seq_cls import SequenceClassification

END = "<|im_end|>"


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    return tokenizer_of("tiny:llama")


def turns(*contents: str, roles: str = "ua") -> dict[str, Any]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    order = (roles * len(contents))[: len(contents)]
    return {"messages": [{"role": names[r], "content": c} for r, c in zip(order, contents, strict=True)]}


def encode(
    tokenizer: Any,
    rows: list[dict[str, Any]],
    *,
    choices: list[str] | None = None,
    control_tokens: ControlRule = "auto",
    **options: Any,
) -> Encoded:
    data = Rows.from_dicts(rows, name="data")
    formatter = Formatter(
        tokenizer,
        columns={},
        template=None,
        available=list(data.columns),
        sample=data.sample(),
        control_tokens=control_tokens,
    )
    task = CausalLM(tokenizer, formatter, head_loss=HeadLoss(), choices=choices)
    return task.encode(data, **{"max_length": 512, "too_long": "error", "training": True, **options})


def kinds(ledger: Ledger, *, errors: bool = True) -> list[str]:
    return [f.kind for f in find(ledger) if f.error or not errors]


def roles(ledger: Ledger) -> dict[str, tuple[int, int]]:
    return {entry["role"]: (entry["seen"], entry["trained"]) for entry in ledger.report()["roles"]}


def test_ledger_report_equals_the_counts_by_hand(tokenizer: Any) -> None:
    """A token is one byte or one special token."""
    rows = [
        turns("be", "ask", "answer", roles="sua"),
        turns("ab", "", "c", "de", "t1", "f", roles="uauata"),
        turns("only a question"),
    ]
    report = encode(tokenizer, rows).ledger.report()
    # Each turn has <|im_start|>, its role, a newline, its words, <|im_end|>, a newline.
    first = {"system": 2, "user": 3, "assistant": len("answer") + 1}
    second = {"user": 2 + 1, "assistant": (0 + 1) + (2 + 1) + (1 + 1), "tool": 2}
    seen = Counter(first) + Counter(second)
    heads = [f"system{0}", "user0", "assistant0", *["user0", "assistant0"] * 2, "tool0", "assistant0"]
    headers = sum(1 + len(h) for h in heads)
    newlines, ends = len(heads), sum(not h.startswith("assistant") for h in heads)
    assert roles_of(report) == {
        "system": (seen["system"], 0),
        "user": (seen["user"], 0),
        "assistant": (seen["assistant"], seen["assistant"]),
        "tool": (seen["tool"], 0),
        "template": (headers + newlines + ends, 0),
    }
    assert [entry["role"] for entry in report["roles"]] == ["system", "user", "assistant", "tool", "template"]
    assert {e["token"]: (e["seen"], e["trained"]) for e in report["special_tokens"]} == {
        "<|im_start|>": (9, 0),
        END: (9, 4),
    }
    assert report["answers"] == {"count": 4, "ended": 4, "cut": 0, "terminators": {END: 4}}
    assert (report["rows"], report["kept"], report["trained"]) == (3, 2, seen["assistant"])
    assert report["left_out"] == [
        {"reason": "dropped: no assistant turn in it", "rows": 1, "where": ["data, record 3"]}
    ]
    json.dumps(report)


def roles_of(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {entry["role"]: (entry["seen"], entry["trained"]) for entry in report["roles"]}


words = st.text("ab <|im_end>\n", max_size=12) | st.sampled_from(["", END, f"x{END}", "user", "assistant"])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(words, min_size=1, max_size=4).map(lambda c: turns(*c)), min_size=1, max_size=6)
    | st.lists(st.builds(lambda p, c: {"prompt": p, "completion": c}, words, words), min_size=1, max_size=6)
    | st.lists(words.map(lambda t: {"text": t}), min_size=1, max_size=6),
    limit=st.integers(3, 60),
    too_long=st.sampled_from(["truncate", "drop"]),
)
def test_ledger_totals_are_those_of_the_examples(tokenizer_of: Any, rows: Any, limit: int, too_long: str) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    encoded = encode(tokenizer, rows, max_length=limit, too_long=too_long)
    ledger, examples = encoded.ledger, encoded.examples
    report = ledger.report()
    ids = np.concatenate([e.ids for e in examples]) if examples else np.zeros(0, np.int32)
    trained = np.concatenate([e.trained for e in examples]) if examples else np.zeros(0, bool)
    assert (report["tokens"], report["trained"]) == (len(ids), int(trained.sum()))
    assert report["kept"] == len(examples) and ledger.kept_rows.tolist() == [e.row for e in examples]
    assert ledger.lengths.tolist() == encoded.lengths.tolist()
    assert sum(r["seen"] for r in report["roles"]) == len(ids)
    assert sum(r["trained"] for r in report["roles"]) == trained.sum()
    for entry in report["special_tokens"]:
        assert entry["seen"] == (ids == entry["id"]).sum()
        assert entry["trained"] == (trained & (ids == entry["id"])).sum()
    assert sum(b["rows"] for b in report["lengths"]["histogram"]) == len(rows)
    left_out = Counter(place for entry in report["left_out"] for place in entry["where"])
    lost = {f"data, record {i + 1}" for i in range(len(rows))} - {f"data, record {e.row + 1}" for e in examples}
    assert lost <= set(left_out) and max(left_out.values(), default=1) == 1


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 100_000) | st.integers(0, 50), min_size=1, max_size=30))
def test_ledger_histogram_covers_all_rows_in_few_ranges(lengths: list[int]) -> None:
    bins = module._histogram(np.array(lengths))
    assert len(bins) <= 9
    assert all(a["to"] + 1 == b["from"] for a, b in pairwise(bins))
    for entry in bins:
        assert entry["rows"] == sum(entry["from"] <= n <= entry["to"] for n in lengths)
    assert sum(entry["rows"] for entry in bins) == len(lengths)


def test_find_on_clean_data_returns_nothing(tokenizer: Any) -> None:
    ledger = encode(tokenizer, [turns("a", "b"), turns("c", "d", "e", "f")]).ledger
    assert find(ledger) == []
    require(ledger)


def test_require_refuses_data_with_zero_trained_tokens(tokenizer: Any) -> None:
    ledger = encode(tokenizer, [turns("a"), turns("b")]).ledger
    with pytest.raises(DataError, match=r"zero trained tokens in all 2 rows \(2 dropped: no assistant turn"):
        require(ledger, training=False)
    assert kinds(ledger) == ["zero_trained"]


def masked(monkeypatch: pytest.MonkeyPatch, *ids: int) -> None:
    """The fault of masking tokens by their id, as peers do that mark padding with another token's id."""
    right = CausalLM._tokenize

    def faulty(self: Any, rendered: Any) -> Any:
        tokens = right(self, rendered)
        return replace(tokens, trained=tokens.trained & ~np.isin(tokens.ids, ids))

    monkeypatch.setattr(CausalLM, "_tokenize", faulty)


@pytest.mark.parametrize(
    "rows", [[turns("a", "b", "c", "d")], [{"prompt": "a", "completion": "b"}]], ids=["chat", "completion"]
)
def test_require_refuses_an_untrained_end_of_turn(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    masked(monkeypatch, tokenizer.eos_token_id)
    ledger = encode(tokenizer, rows).ledger
    assert kinds(ledger) == ["untrained_terminator"]
    with pytest.raises(DataError, match=r"data, record 1.* do not end with a trained end-of-turn token"):
        require(ledger)
    require(ledger, allow=["untrained_terminator"])
    require(ledger, training=False)


def test_require_refuses_padding_that_masks_the_end_of_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    rows = [turns("a", "b")]
    require(encode(tokenizer, rows).ledger)  # our mask goes by position
    masked(monkeypatch, tokenizer.pad_token_id)
    ledger = encode(tokenizer, rows).ledger
    assert kinds(ledger) == ["pad_is_eos", "untrained_terminator"]
    with pytest.raises(DataError, match=r"1 of them inside assistant turns are masked as padding"):
        require(ledger, allow=["untrained_terminator"])
    require(ledger, allow=["untrained_terminator", "pad_is_eos"])


def test_require_refuses_a_template_without_an_end_of_turn(tokenizer: Any) -> None:
    """The end of text closes the last turn of a row, but not those before it."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    single = encode(tokenizer, [turns("a", "b")]).ledger
    assert kinds(single) == [] and single.report()["answers"]["ended"] == 1
    ledger = encode(tokenizer, [turns("a", "b"), turns("a", "b", "c", "d")]).ledger
    assert kinds(ledger) == ["untrained_terminator"]
    with pytest.raises(DataError, match=r"data, record 2: 1 of 3 assistant turns .*writes '\\n' after them"):
        require(ledger)


def chatml(start: str, end: str) -> str:
    return (
        f"{{% for m in messages %}}{start}{{{{ m.role }}}}\n{{{{ m.content }}}}{end}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{start}assistant\n{{% endif %}}"
    )


@pytest.mark.parametrize(
    "end", ["<|eot_id|>", "<end_of_turn>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end|>"]
)
def test_require_refuses_a_template_of_another_family(tokenizer: Any, end: str) -> None:
    tokenizer.chat_template = chatml("<|im_start|>", end)
    ledger = encode(tokenizer, [turns("a", "b")]).ledger
    assert "template_family" in kinds(ledger)
    with pytest.raises(DataError, match=f"ends a turn with {end!r}".replace("|", r"\|")) as error:
        require(ledger)
    assert error.value.key == "model.chat_template"
    require(ledger, allow=["template_family"])


def test_find_notes_headers_of_plain_text(tokenizer: Any) -> None:
    """Zephyr's <|user|> is ordinary text for its tokenizer."""
    tokenizer.chat_template = chatml("<|turn|>", END)
    ledger = encode(tokenizer, [turns("a", "b")]).ledger
    assert kinds(ledger) == [] and kinds(ledger, errors=False) == ["ordinary_markers"]


@pytest.mark.parametrize("written", ["{{ m.content | upper }}", "{{ m.content[:3] }}", ""])
def test_require_refuses_a_template_that_changes_the_words(tokenizer: Any, written: str) -> None:
    tokenizer.chat_template = chatml("<|im_start|>", END).replace(
        "{{ m.content }}", f"{{% if m.role == 'assistant' %}}{written}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    )
    ledger = encode(tokenizer, [turns("question", "the answer"), turns("question", "")]).ledger
    assert kinds(ledger) == ["wrong_mask"]
    with pytest.raises(DataError, match=r"data, record 1: in 1 of 2 assistant turns the trained tokens do not contain"):
        require(ledger)
    require(ledger, allow=["wrong_mask"])


def test_require_refuses_a_trained_header(tokenizer: Any) -> None:
    """Without a generation prompt, the header of an answer looks like the answer."""
    tokenizer.chat_template = chatml("<|im_start|>", END).partition("{% if add_generation_prompt %}")[0]
    ledger = encode(tokenizer, [turns("a", "b"), turns("a", "")]).ledger
    assert kinds(ledger) == ["wrong_mask"]
    with pytest.raises(DataError, match=r"in 2 of 2 assistant turns the header of the answer is trained too"):
        require(ledger)


def test_find_notes_messages_that_the_template_drops(tokenizer: Any) -> None:
    tokenizer.chat_template = chatml("<|im_start|>", END).replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    ledger = encode(tokenizer, [turns("rules", "a", "b", roles="sua"), turns("c", "d")]).ledger
    (note,) = find(ledger)
    assert note.kind == "unwritten_message" and note.rows is not None and note.rows.tolist() == [0]
    assert note.message.startswith("the words of 1 system message are not in the text")


def calling(name: str, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {"city": "Oslo"}}}
    chat = turns("weather?", "", "rain", "It rains.", roles="uata")["messages"]
    chat[1] = {"role": "assistant", "tool_calls": [call], **more}
    return {"messages": chat}


@pytest.mark.parametrize("more", [{"content": ""}, {"content": None}, {}])
def test_find_reports_tool_calls_that_the_template_drops(tokenizer: Any, more: dict[str, Any]) -> None:
    """A template that does not write tool calls would teach silence instead of a call."""
    rows = [calling("get_weather", **more)]
    tokenizer.chat_template = chatml("<|im_start|>", END).replace("m.content", "m.content or ''")
    ledger = encode(tokenizer, rows).ledger
    assert kinds(ledger) == ["wrong_mask"] and "empty_answer" in kinds(ledger, errors=False)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content", "{% for c in m.tool_calls or [] %}call {{ c.function.name }}{% endfor %}{{ m.content"
    )
    assert kinds(encode(tokenizer, rows).ledger) == ["wrong_mask"]  # the arguments are missing
    tokenizer.chat_template = tokenizer.chat_template.replace("c.function.name", "c.function | tojson")
    right = encode(tokenizer, rows)
    assert find(right.ledger) == []
    (example,) = right.examples
    call = 'call {"name": "get_weather", "arguments": {"city": "Oslo"}}'
    assert call + END in tokenizer.decode(example.ids[example.trained])


def test_require_accepts_a_template_that_needs_a_system_turn(tokenizer: Any) -> None:
    """The ledger probes a template with a conversation of the data, not with one of ours."""
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + chatml("<|im_start|>", END)
    )
    require(encode(tokenizer, [turns("s", "a", "b", roles="sua")] * 2).ledger)


def test_find_notes_an_added_end(tokenizer: Any) -> None:
    tokenizer.chat_template = chatml("<|im_start|>", "")
    ledger = encode(tokenizer, [turns("a", "b")]).ledger
    (note,) = find(ledger)
    assert note.kind == "added_end" and not note.error


def test_require_accepts_two_consecutive_ends(tokenizer: Any) -> None:
    tokenizer.chat_template = chatml("<|im_start|>", END + "<|unk|>")
    encoded = encode(tokenizer, [turns("a", "b", "c", "d")])
    require(encoded.ledger)
    (example,) = encoded.examples
    assert tokenizer.decode(example.ids[example.trained]) == f"b{END}<|unk|>d{END}<|unk|>"


def test_find_notes_empty_answers_and_inner_ends(tokenizer: Any) -> None:
    ledger = encode(tokenizer, [turns("a", ""), turns("a", f"one{END}two"), turns("a", "fine")]).ledger
    rows_of_kind = {f.kind: f.rows.tolist() for f in find(ledger) if f.rows is not None}
    assert rows_of_kind == {"empty_answer": [0], "control_as_text": [1]}
    ledger = encode(tokenizer, [turns("a", f"one{END}two"), turns("a", "fine")], control_tokens="keep").ledger
    rows_of_kind = {f.kind: f.rows.tolist() for f in find(ledger) if f.rows is not None}
    assert rows_of_kind == {"inner_end": [0], "control_kept": [0]}


def test_encode_adds_no_end_after_a_last_question(tokenizer: Any) -> None:
    tokenizer.chat_template = chatml("<|im_start|>", "")
    encoded = encode(tokenizer, [turns("a", "b", "c"), turns("d", "e")])
    assert encoded.examples[0].ids[-1] != tokenizer.eos_token_id
    assert kinds(encoded.ledger) == ["untrained_terminator"]


def test_require_refuses_rows_that_are_too_long(tokenizer: Any) -> None:
    rows = [{"prompt": "q", "completion": "a" * n} for n in (3, 30, 20)]
    ledger = encode(tokenizer, rows, max_length=10).ledger
    (finding,) = find(ledger)
    assert finding.kind == "too_long" and finding.rows is not None and finding.rows.tolist() == [1, 2]
    with pytest.raises(
        DataError, match=r"data, record 2, data, record 3: 2 rows have more tokens .* of 10 \(up to 32\)"
    ):
        require(ledger, training=False)
    cut = encode(tokenizer, rows, max_length=10, too_long="truncate").ledger
    require(cut)
    (note,) = find(cut)
    assert note.kind == "answer_cut" and note.rows is not None and note.rows.tolist() == [1, 2]
    assert cut.report()["answers"] == {"count": 3, "ended": 1, "cut": 2, "terminators": {END: 1}}


def test_find_notes_repeated_rows_and_shared_with_lists_common_rows(tokenizer: Any) -> None:
    texts = ["one", "two", "one", "three", "one"]
    ledger = encode(tokenizer, [{"text": t} for t in texts]).ledger
    (note,) = find(ledger)
    assert note.kind == "repeated" and note.rows is not None and note.rows.tolist() == [2, 4]
    other = encode(tokenizer, [{"text": t} for t in ("new", "three", "one")]).ledger
    assert other.shared_with(ledger) == [(1, 3), (2, 0)]
    assert ledger.shared_with(other) == [(0, 2), (2, 2), (3, 1), (4, 2)]


def test_find_notes_a_doubled_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_start|>"
    start = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    ledger = encode(tokenizer, [{"text": "fine"}, {"text": "<|im_start|>twice"}]).ledger
    (note,) = (f for f in find(ledger) if f.kind != "control_kept")
    assert note.kind == "doubled_bos" and note.rows is not None and note.rows.tolist() == [1]
    assert roles(ledger)["tokenizer"] == (2, 0)


def test_find_notes_texts_with_contradicting_labels(tokenizer_of: Callable[[str], Any]) -> None:
    texts, labels = ["a", "b", "a", "c", "b", "dddddd"], ["x", "y", "y", "x", "y", "x"]
    rows = Rows.from_dicts([{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)], name="data")
    task = SequenceClassification(tokenizer_of("tiny:bert"), labels=Labels(["x", "y"]))
    ledger = task.encode(rows, max_length=4, too_long="drop", training=True).ledger
    report = ledger.report()
    assert report["labels"] == [{"label": "x", "rows": 2}, {"label": "y", "rows": 3}]
    assert report["trained"] is None and report["answers"]["count"] == 0
    rows_of_kind = {f.kind: f.rows.tolist() for f in find(ledger) if f.rows is not None}
    assert rows_of_kind == {"repeated": [2, 4], "contradicting": [0, 2]}
    none = task.encode(rows.select([5]), max_length=4, too_long="drop", training=True).ledger
    with pytest.raises(DataError, match="no row is left"):
        require(none)


def test_ledger_drops_choices_that_truncation_cuts(tokenizer: Any) -> None:
    rows = [{"prompt": "p:", "completion": " yes"}, {"prompt": "ppppp:", "completion": " yes"}]
    ledger = encode(tokenizer, rows, choices=[" yes", " no"], max_length=8, too_long="truncate").ledger
    assert [entry["reason"] for entry in ledger.report()["left_out"]] == ["dropped: truncation leaves no whole choice"]
    assert ledger.report()["labels"] == [{"label": " yes", "rows": 1}, {"label": " no", "rows": 0}]


def test_ledger_and_preview_keep_the_separator_of_a_cut_text(tokenizer_of: Callable[[str], Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("tiny:bert")
    ends = [("<|im_start|>", 1), (END, 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=ends
    )
    rows = Rows.from_dicts([{"text": t, "label": n} for t, n in (("abcdefgh", "x"), ("ab", "y"))], name="data")
    task = SequenceClassification(tokenizer, labels=Labels(["x", "y"]))
    encoded = task.encode(rows, max_length=5, too_long="truncate", training=True)
    ids = np.concatenate([e.ids for e in encoded.examples])
    for entry in encoded.ledger.report()["special_tokens"]:
        assert entry["seen"] == (ids == entry["id"]).sum() == 2
    shown = task.preview(rows, 0, max_length=5)
    assert "".join(text for text, _, _ in shown.segments) == tokenizer.decode(encoded.examples[0].ids)
    assert (shown.label, shown.cut) == ("x", 5)


def test_ledger_ignores_dropped_rows_in_shared_and_repeated(tokenizer: Any) -> None:
    long = {"text": "x" * 40}
    ledger = encode(tokenizer, [long, {"text": "one"}, long, {"text": "two"}], max_length=20, too_long="drop").ledger
    other = encode(tokenizer, [long, long, {"text": "two"}], max_length=20, too_long="drop").ledger
    assert other.shared_with(ledger) == [(2, 3)]
    assert ledger.repeated_rows().tolist() == []


def test_encode_restores_the_garbage_collector(tokenizer: Any) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    encode(tokenizer, [turns("a", "b")])
    with pytest.raises(DataError):
        encode(tokenizer, [turns("a", "b"), {"messages": None}])
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0.9 * frozen, "what a run has frozen stays so"
    gc.disable()
    try:
        encode(tokenizer, [turns("a", "b")])
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_find_notes_contradicting_prompts_and_unused_choices(tokenizer: Any) -> None:
    rows = [{"prompt": "good?", "completion": c} for c in (" yes", " no", " yes")] + [
        {"prompt": "x", "completion": " no"}
    ]
    ledger = encode(tokenizer, rows, choices=[" yes", " no", " maybe"]).ledger
    findings = {f.kind: (f.rows.tolist() if f.rows is not None else f.message) for f in find(ledger)}
    assert findings == {
        "repeated": [2], "contradicting": [0, 1, 2], "absent_label": "no row with the label ' maybe'",
    }  # fmt: skip


def test_ledger_totals_comparison_catches_forgotten_truncation(
    tokenizer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Ledger._count
    monkeypatch.setattr(
        Ledger, "_count", lambda self, tokens, kept, lengths, use: right(self, tokens, lengths, lengths)
    )
    with pytest.raises(AssertionError):
        test_ledger_totals_are_those_of_the_examples(tokenizer_of)


def test_ledger_memory_does_not_grow_with_the_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the rows, memory holds some numbers per row and the tokens of one piece."""
    monkeypatch.setattr(causal_lm_module, "pieces", functools.partial(pieces, max_rows=250))

    def peak(count: int) -> int:
        rows = [turns(f"question {i:05} " * 4, f"answer {i:05} " * 8) for i in range(count)]
        tracemalloc.start()
        encoded = encode(tokenizer, rows, keep=False)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert encoded.examples == [] and encoded.ledger.num_tokens > 100 * count
        return used

    peak(250)  # the first call fills caches
    assert (peak(4000) - peak(1000)) / 3000 < 100


def test_ids_without_an_embedding_row_are_an_error_where_they_occur(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<A>", "<B>"]})
    rows = [{"prompt": "Q", "completion": "x"}, {"prompt": "Q<B>", "completion": "x"}]
    ledger = encode(tokenizer, rows).ledger
    assert "unknown_ids" not in kinds(ledger)
    (finding,) = [f for f in find(ledger, num_embeddings=260) if f.error]
    assert finding.kind == "unknown_ids" and finding.rows is not None and finding.rows.tolist() == [1]
    assert finding.message.startswith(
        "the tokenizer writes '<B>' (ids up to 261), but the model has only 260 embedding rows. In Python, call "
        "model.resize_token_embeddings(262)"
    )
    with pytest.raises(DataError, match="<B>"):
        require(ledger, training=False, num_embeddings=260)
    require(ledger, num_embeddings=262)


def test_ids_that_do_not_occur_are_a_note(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<A>", "<B>"]})
    ledger = encode(tokenizer, [{"prompt": "Q", "completion": "x"}]).ledger
    (finding,) = [f for f in find(ledger, num_embeddings=260) if "ids" in f.kind]
    assert (finding.kind, finding.error, finding.rows) == ("unused_ids", False, None)
    assert "2 tokens more than the model has embedding rows (260), such as '<A>'" in finding.message
    assert not [f for f in find(ledger, num_embeddings=300) if "ids" in f.kind]


def test_ids_of_rows_without_tokens_are_none(tokenizer: Any) -> None:
    ledger = encode(tokenizer, [{"prompt": "", "completion": "ab"}, {"prompt": "Q", "completion": "x"}]).ledger
    assert ledger.rows_with_ids(0).tolist() == [0, 1]
    assert ledger.ids_from(0) and not ledger.ids_from(260)
