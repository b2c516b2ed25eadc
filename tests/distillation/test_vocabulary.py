"""The vocabulary contract: probes decide whether two tokenizers are the same, and how many columns they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftlab.distillation.vocabulary import PROBES, Comparison, compare, fingerprint, require_same, shared_width
from peftlab.errors import RecipeError


def byte_level(
    *, rotate: int = 0, merges: tuple[tuple[str, str], ...] = (), special: tuple[str, ...] = ("<pad>", "<eos>")
) -> Any:
    """A byte-level tokenizer. ``rotate`` gives its letters other ids in the same range."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[rotate:] + alphabet[:rotate]
    tokens = [*special[:2], *alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=special[0], eos_token=special[1])
    fast.add_special_tokens({"additional_special_tokens": list(special[2:])})
    return fast


def test_require_same_accepts_the_same_tokenizer() -> None:
    comparison = require_same(byte_level(), byte_level())
    assert comparison.same and comparison.num_shared_ids == 258 and not comparison.notes
    assert fingerprint(byte_level()) == fingerprint(byte_level())


def test_require_same_refuses_equal_width_with_different_ids() -> None:
    student, teacher = byte_level(), byte_level(rotate=1)
    assert len(student) == len(teacher)
    with pytest.raises(RecipeError) as error:
        require_same(student, teacher)
    message = str(error.value)
    assert repr(PROBES[0]) in message and "44 ids] for the teacher" in message and "cross_tokenizer: uld" in message
    first = student(PROBES[0], add_special_tokens=False)["input_ids"][:3]
    assert str(first)[:-1] in message


def test_require_same_accepts_other_tokenizers_with_cross_tokenizer(tokenizer_of: Callable[[str], Any]) -> None:
    pair = tokenizer_of("tiny:llama"), byte_level()
    assert not require_same(*pair, cross_tokenizer="uld").same
    with pytest.raises(RecipeError, match="found 'udl'"):
        require_same(*pair, cross_tokenizer="udl")


def test_fingerprint_differs_for_another_tokenizer() -> None:
    others = [byte_level(rotate=1), byte_level(merges=(("t", "h"),)), byte_level(special=("<pad>", "</s>"))]
    assert len({fingerprint(t) for t in [byte_level(), *others]}) == 4


@pytest.mark.parametrize(
    "merges",
    [(("1", "2"),), (("\u0120", "\u0120"),), (("\u00c3", "\u00a9"),), (("\u00f0", "\u0141"),), (("\u00e4", "\u00bd"),)],
)
def test_compare_probes_each_kind_of_text(merges: tuple[tuple[str, str], ...]) -> None:
    """An extra merge in digits, runs of blanks, accents, emoji or CJK is found, and its probe is named."""
    comparison = compare(byte_level(), byte_level(merges=merges))
    assert (
        not comparison.same and comparison.difference is not None and " for the student and " in comparison.difference
    )


def test_require_same_accepts_a_special_token_on_one_side() -> None:
    student = byte_level(special=("<pad>", "<eos>", "<|chat|>"))
    comparison = require_same(student, byte_level())
    assert comparison.num_shared_ids == 258
    assert comparison.notes == ("special tokens that only the student has: <|chat|> (258)",)
    assert compare(byte_level(), student).notes == ("special tokens that only the teacher has: <|chat|> (258)",)


def test_require_same_refuses_contradicting_special_tokens() -> None:
    both = [byte_level(special=("<pad>", "<eos>", *extra)) for extra in (("<a>", "<b>"), ("<b>", "<a>"))]
    with pytest.raises(RecipeError, match="'<a>' is \\[258\\] for the student and \\[259\\] for the teacher"):
        require_same(*both)
    one, other = (byte_level(special=("<pad>", "<eos>", extra)) for extra in ("<x>", "<y>"))
    with pytest.raises(RecipeError, match="id 258 is the special token '<x>' of the student and '<y>' of the other"):
        require_same(one, other)


def test_require_same_refuses_real_tokenizers_that_differ(tokenizer_of: Callable[[str], Any]) -> None:
    with pytest.raises(RecipeError, match="different tokenizers: 'The quick brown fox"):
        require_same(tokenizer_of("tiny:llama"), byte_level())


def test_shared_width_cuts_padded_columns_and_reports_it() -> None:
    """Qwen2.5 models have 151,936 and 152,064 columns for 151,665 ids of one tokenizer."""
    columns, line = shared_width(Comparison(151_665, None), 151_936, 152_064)
    assert columns == 151_665
    assert line == (
        "vocabulary: same tokenizer, 151,665 ids; logits cut to them, student 151,936 -> 151,665 (-271), "
        "teacher 152,064 -> 151,665 (-399) columns"
    )
    assert shared_width(Comparison(100, None), 100, 100) == (100, "vocabulary: same tokenizer, 100 ids on both sides")


@pytest.mark.parametrize(("widths", "who"), [((99, 120), "student"), ((120, 99), "teacher")])
def test_shared_width_refuses_fewer_columns_than_ids(widths: tuple[int, int], who: str) -> None:
    with pytest.raises(RecipeError, match=f"the {who}'s logits have 99 columns but its tokenizer has 100 ids"):
        shared_width(Comparison(100, None), *widths)


def test_fingerprint_probes_do_not_change() -> None:
    """A changed probe changes every stored fingerprint."""
    assert len(PROBES) == len(set(PROBES)) == 20
    assert fingerprint(byte_level())[:12] == "471228d4c5e7"
