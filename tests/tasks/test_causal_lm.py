"""Causal language modelling: which tokens are trained, the loss, and answers among choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.adapters import HeadLoss
from peftlab.data import Rows, require
from peftlab.data.chat import Formatter
from peftlab.data.rows import Origin
from peftlab.errors import DataError, RecipeError
from peftlab.tasks import Batch
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.choices import Choices
from peftlab.tasks.lm_head import LMHead

EOS = "<|im_end|>"
CHAT = {"user": "{q}", "assistant": "{a}"}
RAW = {"prompt": "{q}:", "completion": " {a}"}
SPACED = {"prompt": "{q}: ", "completion": "{a}"}


def rows_of(rows: list[dict[str, Any]]) -> Rows:
    """Rows as lines 2, 3, ... of a.csv."""
    return Rows(
        name="a.csv",
        columns={c: [r[c] for r in rows] for c in rows[0]},
        fingerprint="",
        origins=(Origin("a.csv", "line"),),
        origin_index=np.zeros(len(rows), dtype=np.int64),
        positions=np.arange(2, len(rows) + 2),
    )


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Any]) -> Any:
    return tokenizer_of("tiny:llama")


def make(tokenizer: Any, rows: Rows, **options: Any) -> CausalLM:
    formatter = Formatter(tokenizer, columns={}, template=options.pop("template", None), available=list(rows.columns))
    return CausalLM(tokenizer, formatter, head_loss=HeadLoss(), **options)


def encode(task: CausalLM, rows: Rows, **options: Any) -> Any:
    return task.encode(rows, **{"max_length": 512, "too_long": "error", "training": True, **options})


def split_by_mask(tokenizer: Any, example: Any) -> list[tuple[bool, str]]:
    """Runs of equally trained tokens as text: ``[(False, "prompt"), (True, "answer")]``."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return [(trained, tokenizer.decode(ids)) for trained, ids in runs]


def masks(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    data = rows_of(rows)
    (example,) = encode(make(tokenizer, data, **options), data).examples
    assert example.weight == example.trained.sum()
    return split_by_mask(tokenizer, example)


def test_text_trains_all_but_the_first_token(tokenizer: Any) -> None:
    assert masks(tokenizer, [{"text": "hello"}]) == [(False, "h"), (True, "ello" + EOS)]


def test_completion_trains_the_completion_and_the_end(tokenizer: Any) -> None:
    assert masks(tokenizer, [{"prompt": "Q: ", "completion": "yes"}]) == [(False, "Q: "), (True, "yes" + EOS)]


def test_completion_without_prompt_skips_the_first_token(tokenizer: Any) -> None:
    assert masks(tokenizer, [{"prompt": "", "completion": "yes"}]) == [(False, "y"), (True, "es" + EOS)]


def test_raw_template_trains_the_completion(tokenizer: Any) -> None:
    assert masks(tokenizer, [{"q": "1+1", "a": 2}], template=RAW) == [(False, "1+1:"), (True, " 2" + EOS)]


def test_chat_trains_the_end_of_turn_but_not_the_newline_after_it(tokenizer: Any) -> None:
    expected = [(False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), (True, "yo" + EOS), (False, "\n")]
    assert masks(tokenizer, [{"q": "hi", "a": "yo"}], template=CHAT) == expected


def test_assistant_turns_are_trained_with_their_end(tokenizer: Any) -> None:
    turns = [("system", "S"), ("user", "u"), ("assistant", "a1"), ("user", "v"), ("assistant", ""), ("user", "w")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert masks(tokenizer, [{"messages": messages}]) == [
        (False, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"),
        (True, "a1" + EOS),
        (False, "\n<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n"),
        (True, EOS),
        (False, "\n<|im_start|>user\nw<|im_end|>\n"),
    ]


def test_untrained_end_of_turn_is_caught(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CausalLM._tokenize

    def faulty(self: Any, rendered: Any) -> Any:
        tokens = right(self, rendered)
        return replace(tokens, trained=tokens.trained & (tokens.ids != tokenizer.eos_token_id))

    monkeypatch.setattr(CausalLM, "_tokenize", faulty)
    with pytest.raises(AssertionError):
        test_chat_trains_the_end_of_turn_but_not_the_newline_after_it(tokenizer)


@pytest.mark.parametrize("text", ["hello", "hello" + EOS])
def test_end_of_text_is_written_once(tokenizer: Any, text: str) -> None:
    assert masks(tokenizer, [{"text": text}]) == [(False, "h"), (True, "ello" + EOS)]
    assert masks(tokenizer, [{"prompt": "Q", "completion": text}]) == [(False, "Q"), (True, "hello" + EOS)]


@pytest.mark.parametrize("special", ["<|im_start|>", "<|unk|>", "<|pad|>"])
def test_special_token_inside_a_text_does_not_end_it(tokenizer: Any, special: str) -> None:
    """Only tokens after the one that *ends* the answer are untrained, not those after any special token."""
    assert masks(tokenizer, [{"prompt": "Q", "completion": f"a{special}b"}]) == [
        (False, "Q"),
        (True, f"a{special}b" + EOS),
    ]
    assert masks(tokenizer, [{"text": f"{special}hello"}]) == [(False, special), (True, "hello" + EOS)]


def test_eos_that_the_tokenizer_writes_is_not_doubled(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {EOS}", special_tokens=[("<|im_start|>", 1), (EOS, 2)]
    )
    rows = rows_of([{"prompt": "Q", "completion": "yes"}])
    task = make(tokenizer, rows)
    (example,) = encode(task, rows).examples
    assert split_by_mask(tokenizer, example) == [(False, "<|im_start|>Q"), (True, "yes" + EOS)]
    (prompt,) = task._rows_prompt_ids(rows)
    assert tokenizer.decode(prompt) == "<|im_start|>Q"


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"prompt": "Q: ", "completion": "yes"}, None),
        ({"q": "hi", "a": "yo"}, CHAT),
        ({"q": "hi", "a": "yo"}, RAW),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, None),
    ],
)
def test_prompt_at_prediction_is_the_start_of_the_training_row(tokenizer: Any, row: Any, template: Any) -> None:
    rows = rows_of([row])
    task = make(tokenizer, rows, template=template)
    (example,) = encode(task, rows).examples
    (prompt,) = task._rows_prompt_ids(rows)
    assert example.ids[: len(prompt)].tolist() == prompt.tolist()
    assert example.trained.argmax() == len(prompt)


def test_data_with_zero_trained_tokens_is_refused(tokenizer: Any) -> None:
    empty = rows_of([{"messages": [{"role": "user", "content": "u"}]}] * 2)
    with pytest.raises(DataError, match="zero trained tokens in all 2 rows"):
        require(encode(make(tokenizer, empty), empty).ledger)


def test_rows_without_trained_tokens_are_dropped_and_reported(tokenizer: Any) -> None:
    user = [{"role": "user", "content": "u"}]
    rows = rows_of([{"messages": user}, {"messages": [*user, {"role": "assistant", "content": "a"}]}])
    encoded = encode(make(tokenizer, rows), rows)
    assert [e.row for e in encoded.examples] == [1]
    assert encoded.ledger.report()["left_out"] == [
        {"reason": "dropped: no assistant turn in it", "rows": 1, "where": ["a.csv:2"]}
    ]


def test_rows_that_are_too_long_are_refused_dropped_or_truncated(tokenizer: Any) -> None:
    rows = rows_of([{"prompt": "Q", "completion": "y"}, {"prompt": "Q", "completion": "yes!"}])
    task = make(tokenizer, rows)
    with pytest.raises(DataError, match=r"a\.csv:3: 1 row has more tokens than the limit of 4 \(up to 6\)"):
        require(encode(task, rows, max_length=4).ledger)
    assert [e.row for e in encode(task, rows, max_length=4, too_long="drop").examples] == [0]
    cut = encode(task, rows, max_length=4, too_long="truncate")
    assert split_by_mask(tokenizer, cut.examples[1]) == [(False, "Q"), (True, "yes")]
    assert cut.ledger.report()["left_out"] == [
        {"reason": "truncated: longer than data.max_length (4 tokens)", "rows": 1, "where": ["a.csv:3"]}
    ]
    long = rows_of([{"prompt": "Q" * 9, "completion": "y"}])
    with pytest.raises(DataError, match="zero trained tokens"):
        require(encode(task, long, max_length=4, too_long="truncate").ledger)


MIXED = [{"q": "how", "a": "yes"}, {"q": "what is it", "a": "no, it is longer"}, {"q": "", "a": ""}]


def full_logits_loss(model: Any, batch: Batch) -> Any:
    """The textbook loss: all logits, label -100 for untrained tokens, shifted by one."""
    labels = batch.input_ids.masked_fill(~batch.trained, -100)
    logits = model(**batch.inputs).logits.double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == want.keys() and got
    for name, gradient in want.items():
        assert float(gradient.abs().max()) > 0, name
        error = float((got[name] - gradient).abs().max())
        assert error <= tolerance * float(gradient.abs().max()), f"{name}: {error:.3g}"


def mixed_batch(tokenizer: Any) -> tuple[CausalLM, Batch]:
    rows = rows_of(MIXED)
    task = make(tokenizer, rows, template=CHAT)
    return task, task.collate(encode(task, rows).examples, "cpu")


def test_loss_and_gradients_equal_those_of_all_logits(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", dtype="float64")
    task, batch = mixed_batch(tokenizer)
    assert batch.attention_mask is not None
    ours, theirs = task.loss_sum(model, batch), full_logits_loss(model, batch)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-9)
    assert_same_gradients(gradients(model, ours), gradients(model, theirs), 1e-9)


@pytest.mark.parametrize("options", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_loss_with_a_trained_head_equals_that_of_all_logits(
    tokenizer: Any, tiny: Callable[..., Any], options: Any
) -> None:
    model = tiny("tiny:llama", dtype="float64", **options)
    task, batch = mixed_batch(tokenizer)
    ours, theirs = task.loss_sum(model, batch), full_logits_loss(model, batch)
    assert any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad)
    assert_same_gradients(gradients(model, ours), gradients(model, theirs), 1e-9)


def _shifted_targets(self: CausalLM, model: Any, batch: Batch) -> Any:
    """The token at a position predicts itself."""
    hidden = self._head.hidden_states(model, batch.inputs)
    return hidden[:, 1:][batch.trained[:, 1:]], batch.input_ids[:, 1:][batch.trained[:, 1:]]


def _unmasked(self: CausalLM, model: Any, batch: Batch) -> Any:
    hidden = self._head.hidden_states(model, batch.inputs)
    everywhere = torch.ones_like(batch.trained[:, 1:])
    return hidden[:, :-1][everywhere], batch.input_ids[:, 1:][everywhere]


@pytest.mark.parametrize("fault", [_shifted_targets, _unmasked])
def test_wrong_selection_of_positions_is_caught(
    tokenizer: Any, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    monkeypatch.setattr(CausalLM, "_selected", fault)
    with pytest.raises(AssertionError):
        test_loss_and_gradients_equal_those_of_all_logits(tokenizer, tiny)


def test_score_counts_what_the_loss_trains(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", dtype="float64")
    task, batch = mixed_batch(tokenizer)
    scores = task.score(model, batch)
    logits = model(**batch.inputs).logits[:, :-1]
    hits = (logits.argmax(-1) == batch.input_ids[:, 1:]) & batch.trained[:, 1:]
    assert scores["nll_sum"] == pytest.approx(float(full_logits_loss(model, batch).detach()), rel=1e-5)
    assert scores["num_tokens"] == int(batch.trained.sum())
    assert scores["num_correct"] == int(hits.sum())
    assert scores["rows_right"] == [bool(h[m].all()) for h, m in zip(hits, batch.trained[:, 1:], strict=True)]


def test_head_that_transforms_its_logits_is_refused(
    tokenizer: Any, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("tiny:llama")
    base = model.get_base_model()
    forward = base.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(base, "forward", doubled)
    task, batch = mixed_batch(tokenizer)
    with pytest.raises(RecipeError, match="LlamaForCausalLM: logits of chosen positions differ"):
        task.loss_sum(model, batch)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "gpt2"])
def test_head_transforms_logits_as_each_family_does(family: str) -> None:
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    wide = {**sizes, "intermediate_size": 32, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "gemma2": lambda: transformers.Gemma2Config(**wide, head_dim=8, final_logit_softcapping=0.5),
        "granite": lambda: transformers.GraniteConfig(**wide, logits_scaling=8.0),
        "cohere": lambda: transformers.CohereConfig(**wide, logit_scale=0.25),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[family]()).double().eval()
    for parameter in model.parameters():  # like a loaded backbone: frozen, so that the op itself is used
        parameter.data.mul_(4.0)
        parameter.requires_grad_(False)
    ids = torch.randint(3, 50, (2, 7))
    head = LMHead(HeadLoss())
    hidden = head.hidden_states(model, {"input_ids": ids})
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits(model, hidden.flatten(0, 1)), logits.flatten(0, 1), rtol=1e-5, atol=1e-5)
    want = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
    got = head.cross_entropy_sum(model, hidden.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


CHOICES = {
    "distinct": ["ham", "spam"],
    "shared prefix": ["not spam", "not sure", "not"],
    "nested": ["a", "ab", "abc", "b"],
    "one is a prefix": ["x", "xy"],
}


def constrained_decoding(model: Any, prompt: list[int], choices: list[list[int]], end: int) -> tuple[int, float]:
    """Greedy decoding that allows only tokens which lead to a choice. Probabilities are over the allowed tokens."""
    written, probability = [], 1.0
    while True:
        logits = model(input_ids=torch.tensor([prompt + written])).logits[0, -1].double()
        allowed = {([*c, end])[len(written)] for c in choices if c[: len(written)] == written}
        shares = {t: float(logits[t].exp()) for t in allowed}
        best = max(shares, key=shares.__getitem__)
        probability *= shares[best] / sum(shares.values())
        if best == end:
            return choices.index(written), probability
        written.append(best)


@pytest.mark.parametrize(
    ("choices", "template"),
    [
        *(pytest.param(choices, CHAT, id=f"{name}, chat") for name, choices in CHOICES.items()),
        *(
            pytest.param(choices, SPACED, id=f"{name}, raw", marks=() if name == "nested" else pytest.mark.slow)
            for name, choices in CHOICES.items()
        ),
    ],
)
def test_choices_agree_with_constrained_decoding(
    tokenizer: Any, tiny: Callable[..., Any], choices: list[str], template: Any
) -> None:
    rows = rows_of([{"q": f"{'why ' * (i % 4)}{i}", "a": choices[i % len(choices)]} for i in range(12)])
    task = make(tokenizer, rows, template=template, choices=choices)
    examples = encode(task, rows).examples
    assert [e.label for e in examples] == [i % len(choices) for i in range(12)]
    ids = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices]
    winners = set()
    for seed in range(4):
        model = tiny("tiny:llama", seed=seed).eval()
        for name, p in model.named_parameters():
            if "lora" in name:
                p.data.mul_(8)  # spreads the logits so that every choice wins somewhere
        with torch.no_grad():
            prompts = [p.tolist() for p in task._rows_prompt_ids(rows)]
            want = [constrained_decoding(model, p, ids, tokenizer.eos_token_id) for p in prompts]
            scores = task.score(model, task.collate(examples, "cpu"))
            predicted = list(task.predict(model, rows, batch_tokens=100, max_length=512))
        assert scores["predictions"] == [index for index, _ in want]
        assert scores["references"] == [e.label for e in examples]
        assert [p["label"] for p in predicted] == [choices[index] for index, _ in want]
        assert [p["probability"] for p in predicted] == pytest.approx([p for _, p in want], rel=1e-4)
        winners |= {index for index, _ in want}
    assert len(winners) > 1


def test_choices_that_are_always_the_first_are_caught(
    tokenizer: Any, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Choices, "choose", lambda self, model, head, prefixes, logits: [(0, 1.0)] * len(prefixes))
    with pytest.raises(AssertionError):
        test_choices_agree_with_constrained_decoding(tokenizer, tiny, ["ham", "spam"], CHAT)


def test_choices_that_are_nested_end_with_the_trained_token(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    """Many chat models end a turn with another token than the tokenizer's eos. "ab" and "a" differ at that token."""
    tokenizer.eos_token = "<|unk|>"
    rows = rows_of([{"q": str(i), "a": "x"} for i in range(8)])
    task = make(tokenizer, rows, template=CHAT, choices=["x", "xy"])
    examples = encode(task, rows).examples
    assert split_by_mask(tokenizer, examples[0])[1] == (True, "x<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in ["x", "xy"]]
    for seed in range(4):
        model = tiny("tiny:llama", seed=seed).eval()
        for name, p in model.named_parameters():
            if "lora" in name:
                p.data.mul_(8)
        with torch.no_grad():
            want = [constrained_decoding(model, p.tolist(), ids, end)[0] for p in task._rows_prompt_ids(rows)]
            assert task.score(model, task.collate(examples, "cpu"))["predictions"] == want


def test_completion_outside_of_the_choices_is_refused(tokenizer: Any) -> None:
    rows = rows_of([{"q": "1", "a": "ham"}, {"q": "2", "a": "hams"}])
    task = make(tokenizer, rows, template=CHAT, choices=["ham", "spam"])
    with pytest.raises(
        DataError, match=r"a\.csv:3: the completion 'hams' is not one of eval.choices: 'ham', 'spam'"
    ) as e:
        encode(task, rows)
    assert e.value.key == "eval.choices"


def train_a_little(task: CausalLM, model: Any, batch: Batch, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (task.loss_sum(model, batch) / float(batch.trained.sum())).backward()
        optimizer.step()
    model.eval()


def test_exact_match_equals_greedy_generation(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    rows = rows_of(
        [{"q": "one", "a": "1st"}, {"q": "two", "a": "2nd"}, {"q": "three", "a": "3rd"}, {"q": "six", "a": "6th"}]
    )
    task = make(tokenizer, rows, template=CHAT)
    examples = encode(task, rows).examples
    torch.manual_seed(0)
    model = tiny("tiny:llama", rank=16)
    train_a_little(task, model, task.collate(examples[:2], "cpu"), 80)
    exact = task.score(model, task.collate(examples, "cpu"))["rows_right"]
    answers = [a["text"] for a in task.generate(model, rows, batch_tokens=200, max_length=512, max_new_tokens=8)]
    assert exact == [answer == a for answer, a in zip(answers, rows.columns["a"], strict=True)]
    assert exact[:2] == [True, True] and not all(exact), "the comparison needs both outcomes"


def test_generation_is_independent_of_batching(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    """Left padding must change neither an answer nor the order of the results."""
    rows = rows_of([{"q": "x" * n, "a": "y"} for n in (3, 30, 1, 12)])
    task = make(tokenizer, rows, template=CHAT)
    model = tiny("tiny:llama").eval()
    answers = [
        [a["text"] for a in task.predict(model, rows, batch_tokens=n, max_length=512, max_new_tokens=6)]
        for n in (1, 4096)
    ]
    assert answers[0] == answers[1]


def test_head_is_verified_on_the_start_of_a_row_only() -> None:
    """All logits of a long row, twice and in float32, could be gigabytes that training never needs."""
    from peftlab.models import find_pretrained, load_model

    model = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")
    lengths = []
    model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[-2]))
    hidden = LMHead(HeadLoss()).hidden_states(model, {"input_ids": torch.arange(4, 204)[None]})
    assert hidden.shape[1] == 200
    assert lengths and max(lengths) <= 32


@pytest.fixture
def tagger(tokenizer_of: Callable[[str], Any]) -> Any:
    """A tokenizer with the special tokens <A> (260) and <B> (261), which end no text."""
    tokenizer = tokenizer_of("tiny:llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<A>", "<B>"]})
    return tokenizer


@pytest.mark.parametrize("row", [{"prompt": "Q", "completion": "<A>"}, {"prompt": "Q", "completion": "x<B>"}])
def test_end_of_text_follows_an_answer_that_ends_in_another_special_token(tagger: Any, row: dict[str, str]) -> None:
    assert masks(tagger, [row]) == [(False, "Q"), (True, row["completion"] + EOS)]


def test_end_of_turn_of_the_template_ends_an_answer(tagger: Any) -> None:
    """Its ``<B>`` ends turns instead of the end of text; ``<A>`` in an answer does not."""
    tagger.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '<B>\n' }}{% endfor %}"
    tagger.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<A>"}]}]
    assert masks(tagger, rows) == [(False, "user:q<B>\nassistant:"), (True, "a<A><B>"), (False, "\n")]
    task = make(tagger, rows_of(rows), end_ids=[1])
    assert task.generation_kwargs(1, {})["eos_token_id"] == [1, 2, 261]
    assert task.ends(np.array([5, 261])) and not task.ends(np.array([5, 260]))


def test_text_of_an_answer_keeps_special_tokens_but_not_its_end(tagger: Any) -> None:
    task = make(tagger, rows_of([{"prompt": "Q", "completion": "x"}]))
    assert task.text_of(np.array([260, 2])) == "<A>"
    assert task.text_of(np.array([*tagger("hi", add_special_tokens=False)["input_ids"], 261, 2, 0, 0])) == "hi<B>"


def test_prompts_with_unknown_ids_are_refused(tagger: Any) -> None:
    rows = rows_of([{"prompt": "Q", "completion": ""}, {"prompt": "Q<A>", "completion": ""}])
    task = make(tagger, rows, num_embeddings=260)
    with pytest.raises(
        DataError, match=r"^a\.csv:3: the tokenizer writes '<A>' \(ids up to 260\), but the model has only"
    ):
        task.prompt_lengths(rows)
    assert make(tagger, rows, num_embeddings=261).prompt_lengths(rows) == [1, 2]
