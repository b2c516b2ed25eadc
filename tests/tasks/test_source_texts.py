"""Tokens of both sides by tokenizers of several kinds: languages before or after the text, and two vocabularies of pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftlab.data import Rows
from peftlab.errors import RecipeError
from peftlab.tasks.source_texts import SourceTexts
from tests.family_examples import language_tokenizer

ROWS = Rows.from_dicts([{"source": "ab", "target": "ba"}], name="rows")
# Family, languages, the tokens of both sides, and what ``generate`` needs for the target language.
CASES = [
    ("mbart", "en_XX", "de_DE", "▁ a b </s> en_XX", "▁ b a </s> de_DE", "decoder_start_token_id"),
    ("mbart50", "en_XX", "de_DE", "en_XX ▁ a b </s>", "de_DE ▁ b a </s>", "forced_bos_token_id"),
    ("nllb", "eng_Latn", "deu_Latn", "eng_Latn ▁ a b </s>", "deu_Latn ▁ b a </s>", "forced_bos_token_id"),
]


def tokens_of(texts: SourceTexts) -> tuple[str, str]:
    sides = texts.sides(ROWS)
    words = texts.tokenizer.convert_ids_to_tokens
    return " ".join(words(sides.sources[0].tolist())), " ".join(words(sides.targets[0].tolist()))


@pytest.mark.parametrize(("family", "source", "target", "read", "written", "argument"), CASES)
def test_languages_stand_where_the_family_has_them(
    family: str, source: str, target: str, read: str, written: str, argument: str
) -> None:
    tokenizer = language_tokenizer(family)
    texts = SourceTexts(tokenizer, source_language=source, target_language=target)
    assert tokens_of(texts) == (read, written)
    assert texts.first_of_target() == {argument: tokenizer.convert_tokens_to_ids(target)}


def test_cut_texts_keep_their_language() -> None:
    texts = SourceTexts(language_tokenizer("mbart"), source_language="en_XX", target_language="de_DE")
    sides = texts.sides(Rows.from_dicts([{"source": "abab", "target": "baba"}], name="rows"))
    tokens = sides.tokens(sides.limits(4, 3))
    words = texts.tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    assert words == ["▁", "a", "</s>", "en_XX", "▁", "b", "de_DE"]
    assert not tokens.answer_ended.any()  # without its end it does not teach to stop there
    answer = texts.with_answers(ROWS, [np.array(texts.tokenizer.convert_tokens_to_ids(["▁", "b", "</s>"]))], {2})
    assert texts.tokenizer.convert_ids_to_tokens(answer.targets[0].tolist())[-1] == "de_DE"  # where the shift starts


@pytest.mark.parametrize(
    ("family", "options", "key", "message"),
    [
        ("mbart", {"source_language": "en_XX"}, "target", "missing: the tokenizer MBartTokenizer writes the language"),
        (
            "mbart",
            {"source_language": "en_X", "target_language": "de_DE"},
            "source",
            r"'en_X'; did you mean 'en_XX'\? The",
        ),
        (
            "nllb",
            {"source_language": "eng_Latn", "target_language": "deu"},
            "target",
            "unknown language 'deu'; did you mean",
        ),
        ("mbart", {"source_language": "en_XX", "target_language": "ab"}, "target", "unknown language 'ab'"),
        (
            "tiny",
            {"target_language": "de_DE"},
            "target",
            "has no languages; remove it, or write the languages into data.prefix",
        ),
    ],
)
def test_wrong_languages_are_refused(
    family: str, options: dict[str, str], key: str, message: str, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of("tiny:llama") if family == "tiny" else language_tokenizer(family)
    with pytest.raises(RecipeError, match=message) as caught:
        SourceTexts(tokenizer, **options)
    assert caught.value.key == f"data.{key}_language"


@pytest.fixture
def marian(tmp_path: Path) -> Any:
    """Marian's tokenizer has two vocabularies of pieces and no fast version."""
    import sentencepiece
    import transformers

    for side, text in (("source", "abc"), ("target", "xyz")):
        (tmp_path / f"{side}.txt").write_text("\n".join([text, text[::-1], text[1:]] * 20))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / f"{side}.txt"), model_prefix=str(tmp_path / side), vocab_size=8, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
    pieces = ["</s>", "<unk>", *"abcxyz", "▁", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    return transformers.MarianTokenizer(
        *(str(tmp_path / f"{side}.model") for side in ("source", "target")), str(tmp_path / "vocab.json")
    )


def test_marian_reads_with_one_vocabulary_and_writes_with_another(marian: Any) -> None:
    texts = SourceTexts(marian)
    sides = texts.sides(Rows.from_dicts([{"source": "ac", "target": "zx"}], name="rows"))
    words = marian.convert_ids_to_tokens
    assert [w for w in words(sides.sources[0].tolist()) if w != "▁"] == ["a", "c", "</s>"]
    assert [w for w in words(sides.targets[0].tolist()) if w != "▁"] == ["z", "x", "</s>"]
    assert texts.first_of_target() == {}
