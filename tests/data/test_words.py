"""Words of texts and their tokens, with tokenizers of every kind, on texts that are hard to align."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.data.words import joined_words, tokenize_words, words_of

HARD = [
    "Angela Merkel visited Paris.",
    "two  spaces, a\ttab\nand\r\nlines ",
    "  begins with spaces",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \ufb01nance \u2460 \u00bd",
    "\U0001f600 smile \U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f1e9\U0001f1ea flag \u2764\ufe0f",
    "\u5317\u4eac\u5927\u5b66 is in \u5317\u4eac",
    "\u3053\u3093\u306b\u3061\u306f \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "U.S.-based O'Neil's (e.g.) ... 1,000.50 $5 50% a_b #tag @user http://x.y/z?q=1",
    "word\u00a0word word\u3000word zero\u200bwidth soft\u00adhyphen",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u05e9\u05dc\u05d5\u05dd",
    "[MASK] <s> </s> [SEP]",
    "x" * 300,
]
CHARACTERS = st.one_of(
    st.sampled_from(" \t\n.,'-aeEX1"), st.sampled_from("".join(HARD)), st.characters(exclude_categories=["Cs"])
)
KINDS = ["bert", "roberta", "gpt2", "gpt2 with a space in front", "t5", "albert", "llama"]


@functools.cache
def tokenizer(kind: str) -> Any:
    """A small tokenizer of the kind, with a vocabulary of the hard texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted({c for text in HARD for c in text if not c.isspace()})
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer: Any
    if kind == "bert":
        made = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, initial_alphabet=alphabet[:80])
        post: Any = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    elif kind in ("t5", "albert"):
        made = Tokenizer(models.Unigram())
        if kind == "albert":
            made.normalizer = normalizers.Sequence(
                [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
            )
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=special, unk_token="<unk>")
        post = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    elif kind == "llama":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], limit_alphabet=60
        )
        post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    else:
        in_front = kind != "gpt2"
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=in_front)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        post = processors.ByteLevel(trim_offsets=False)
        if kind == "roberta":
            post = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), trim_offsets=True, add_prefix_space=in_front)
    made.train_from_iterator(HARD[:4] * 5 + HARD[6:8], trainer)
    made.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def aligned(kind: str, text: str, *, last: bool) -> tuple[Any, Any, list[tuple[int, int]], list[tuple[int, int]]]:
    words = words_of(text)
    tokens, (found,) = tokenize_words(tokenizer(kind), [text], [words], last=last)
    offsets = tokenizer(kind)(text, verbose=False).encodings[0].offsets
    assert len(offsets) == len(tokens.ids)
    return tokens, found, words, offsets


def check(kind: str, text: str, *, last: bool) -> None:
    """Each word has one position, whose token has characters of it, unless no token has any of its characters."""
    tokens, found, words, offsets = aligned(kind, text, last=last)
    assert np.flatnonzero(tokens.trained).tolist() == found.tokens.tolist()
    covered = found.missing.tolist()
    for token, first, final in zip(found.tokens.tolist(), found.firsts.tolist(), found.lasts.tolist(), strict=True):
        inside = range(first, final + 1)
        covered += inside
        for k in inside:
            touching = [t for t, (a, b) in enumerate(offsets) if a < b and a < words[k][1] and b > words[k][0]]
            assert token == (touching[-1] if last else touching[0]) or k in found.missing
    assert sorted({*covered}) == list(range(len(words)))
    for k in found.missing.tolist():
        assert not any(a < b and a < words[k][1] and b > words[k][0] for a, b in offsets)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_align(kind: str, text: str, last: bool) -> None:
    check(kind, text, last=last)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    text=st.text(
        st.one_of(
            st.sampled_from(" \t\n.,'-aeEX1"), st.sampled_from("".join(HARD)), st.characters(exclude_categories=["Cs"])
        ),
        max_size=40,
    )
)
def test_any_text_aligns(kind: str, text: str) -> None:
    if words_of(text):
        check(kind, text, last=False)
        check(kind, text, last=True)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_words_have_a_position_each(kind: str) -> None:
    """A deliberate fault, offsets that begin one character later, takes the next word's token or none."""
    text, words = joined_words(["the", "cat", "sat", "on", "the", "mat", "of", "New", "York"])
    _, (found,) = tokenize_words(tokenizer(kind), [text], [words], last=False)
    assert len(found) == len(words) and not len(found.missing)
    shifted = [(start - 1, end - 1) for start, end in words[1:]]
    _, (other,) = tokenize_words(tokenizer(kind), [text], [shifted], last=True)
    assert (
        other.tokens.tolist() != tokenize_words(tokenizer(kind), [text], [words[1:]], last=True)[1][0].tokens.tolist()
    )


def test_words_are_runs_of_letters_and_single_signs() -> None:
    def texts(text: str) -> list[str]:
        return [text[start:end] for start, end in words_of(text)]

    assert texts("Dr. O'Neil-Smith\u2019s caf\u00e9s") == [
        "Dr",
        ".",
        "O",
        "'",
        "Neil",
        "-",
        "Smith",
        "\u2019",
        "s",
        "caf\u00e9s",
    ]
    assert texts("cafe\u0301 x\u200by") == ["cafe\u0301", "x", "y"]
    assert texts("in\u5317\u4eac2024") == ["in", "\u5317", "\u4eac", "2024"]
    assert texts("\U0001f468\u200d\U0001f469\u200d\U0001f467!") == ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "!"]
    assert texts(" \t\u00a0\u200b") == []


def test_joined_words_are_where_they_say() -> None:
    text, words = joined_words(["New York", "", "x"])
    assert text == "New York  x" and [text[a:b] for a, b in words] == ["New York", "", "x"]


def test_words_that_one_token_stands_for_share_a_position() -> None:
    _, found, words, offsets = aligned("gpt2", "wait ... (x)", last=False)
    assert len(words) == 7
    shared = [(a, b) for a, b in zip(found.firsts.tolist(), found.lasts.tolist(), strict=True) if b > a]
    for first, final in shared:
        assert any(a <= words[first][0] and words[final][0] < b for a, b in offsets)
