"""Checks whether two models have the same classes, by their tokenizers' behaviour, never by the width of their logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.errors import RecipeError

# Encoded without special tokens. Each kind distinguishes tokenizers that agree on the others: pieces of words, digit
# grouping, indentation, byte fallback, normalisation of accents and spaces.
PROBES: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog.",
    "It's what they'd've said: \"don't\" & 'won't' - I'll, we're!",
    "internationalization uncharacteristically pseudopseudohypoparathyroidism",
    "HELLO World camelCase snake_case kebab-case CONSTANT_NAME",
    "0 1 12 123 1234 12345 3.14159 1,234,567.89 2024-02-29 0xDEADBEEF 1e-10",
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(x)]\n\n\tif (a != b && c <= d) { x += 1; }",
    '<div class="a">&amp;</div> {"key": [null, true, -1]} SELECT * FROM t WHERE a LIKE \'%b\';',
    "https://example.org/path?query=1#part user@example.org C:\\dir\\file.txt",
    "caf\u00e9 na\u00efve \u00fcber \u00e5ngstr\u00f6m \u0141\u00f3d\u017a cafe\u0301 stra\u00dfe \ufb01",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0393\u03b5\u03b9\u03ac",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u4f60\u597d\u4e16\u754c \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u7e41\u9ad4\u4e2d\u6587",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea \u2764\ufe0f \U00010348 \u2200x\u2208\u211d \u2211\u222b\u221a",
    " leading",
    "trailing ",
    "two  three   four    eight        sixteen                end",
    "\t\ttabs\n\n\nnewlines\r\ncarriage \u00a0nbsp\u3000wide",
    "\n",
    "    ",
    "a\u0000b\u200bc",
)
# Maximum number of ids shown of an encoding.
_SHOWN = 12


@dataclass(frozen=True)
class Comparison:
    """How two tokenizers encode the probes.

    Attributes:
        num_shared_ids: columns with the same meaning in both models. difference: the first probe that they encode
            differently, with both encodings; None if they are the same. notes: special tokens that only one of them has.
    """

    num_shared_ids: int
    difference: str | None
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return self.difference is None


def compare(student_tokenizer: Any, teacher_tokenizer: Any) -> Comparison:
    """Compares the ids of the probes and of the common special tokens.

    A special token that only one tokenizer has is no difference if its id is unused in the other, such as padding or chat
    tokens added later. An id with a special token in one and another token in the other is a difference.
    """
    student, teacher = _special_ids(student_tokenizer), _special_ids(teacher_tokenizer)
    difference = _first_difference(
        [*PROBES, *sorted(student.keys() & teacher.keys())], student_tokenizer, teacher_tokenizer
    )
    notes = []
    for name, own, other, other_tokenizer in (
        ("student", student, teacher, teacher_tokenizer),
        ("teacher", teacher, student, student_tokenizer),
    ):
        alone = []
        for token, i in sorted(own.items(), key=lambda item: item[1]):
            other_token = other_tokenizer.convert_ids_to_tokens(i) if i < _num_ids(other_tokenizer) else None
            if token in other or other_token == token:
                continue
            if other_token is not None and difference is None:
                difference = f"id {i:,} is the special token {token!r} of the {name} and {other_token!r} of the other"
            alone.append(f"{token} ({i:,})")
        if alone:
            notes.append(f"special tokens that only the {name} has: {', '.join(alone)}")
    num_shared = min(_num_ids(student_tokenizer), _num_ids(teacher_tokenizer))
    return Comparison(num_shared, difference, tuple(notes))


def require_same(student_tokenizer: Any, teacher_tokenizer: Any, *, cross_tokenizer: str | None = None) -> Comparison:
    """``compare``, with an error if the tokenizers differ.

    Args: cross_tokenizer: ``uld`` allows a difference, for a loss that does not compare classes by number.
    Raises: RecipeError with the first probe that differs, both encodings and what to do.
    """
    if cross_tokenizer not in (None, "uld"):
        raise RecipeError(f"expected cross_tokenizer to be uld or unset, found {cross_tokenizer!r}")
    comparison = compare(student_tokenizer, teacher_tokenizer)
    if not comparison.same and cross_tokenizer is None:
        raise RecipeError(
            f"student and teacher have different tokenizers: {comparison.difference}. The columns of their logits mean "
            "different tokens, so their distributions cannot be compared class by class. Use a teacher with the student's "
            "tokenizer, or set cross_tokenizer: uld"
        )
    return comparison


def shared_width(comparison: Comparison, student_width: int, teacher_width: int) -> tuple[int, str]:
    """The number of leading columns to cut both models' logits to, and a line about it.

    Columns beyond the tokenizer's ids are padding to a round matrix size. Cutting them equals -inf there; zeros would hold
    probability.

    Args: student_width, teacher_width: number of columns of the logits.
    Raises: RecipeError if a model has fewer columns than its tokenizer has shared ids.
    """
    columns = comparison.num_shared_ids
    for name, width in (("student", student_width), ("teacher", teacher_width)):
        if width < columns:
            raise RecipeError(
                f"the {name}'s logits have {width:,} columns but its tokenizer has {columns:,} ids: model and tokenizer do not "
                "match, or tokens were added to the tokenizer without resizing the model's embeddings"
            )
    if student_width == teacher_width == columns:
        return columns, f"vocabulary: same tokenizer, {columns:,} ids on both sides"
    return columns, (
        f"vocabulary: same tokenizer, {columns:,} ids; logits cut to them, student {student_width:,} -> {columns:,} "
        f"(-{student_width - columns:,}), teacher {teacher_width:,} -> {columns:,} (-{teacher_width - columns:,}) columns"
    )


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the ids of the probes and the special tokens; tokenizers with equal ones can share stored targets."""
    content = {
        "probes": [_encode(tokenizer, probe) for probe in PROBES],
        "special": sorted(_special_ids(tokenizer).items()),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _first_difference(probes: Sequence[str], student_tokenizer: Any, teacher_tokenizer: Any) -> str | None:
    for probe in probes:
        student, teacher = _encode(student_tokenizer, probe), _encode(teacher_tokenizer, probe)
        if student != teacher:
            return f"{probe!r} is {_shown(student)} for the student and {_shown(teacher)} for the teacher"
    return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shown(ids: list[int]) -> str:
    return str(ids) if len(ids) <= _SHOWN else f"{str(ids[:_SHOWN])[:-1]}, ... {len(ids)} ids]"


def _special_ids(tokenizer: Any) -> dict[str, int]:
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def _num_ids(tokenizer: Any) -> int:
    return 1 + max(tokenizer.get_vocab().values(), default=-1)
